"""What is written from one source for those who watch a cluster: the PrometheusRule and the page of all metrics."""
