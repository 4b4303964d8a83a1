"""OpenAI's /v1/responses: a translation in and out of what chat completions do, and what is kept between requests."""
