"""The model behind HTTP: OpenAI's API over the serving engine. Needs the extra `serve`.

Read in this order: settings, api_errors, json_body, schemas, border, backend, exchange, routes.
"""
