"""The OpenAI HTTP surface: parse, template, validate, stream."""
