"""The placement page on the port of Ray's own dashboard, and dashboards of kvray for Grafana."""
