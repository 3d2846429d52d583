"""The chat page: Gradio's components in front of the same engine, as one more client of it."""
