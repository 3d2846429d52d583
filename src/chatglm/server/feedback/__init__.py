"""What people say about answers, kept in one SQLite file: docs/feedback.md has its tables.

Needs no web library, so that `chatglm data feedback` reads a file anywhere.
"""
