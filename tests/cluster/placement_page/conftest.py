from tests.cluster.openai.conftest import served_model, tokenizer  # noqa: F401 - fixtures
