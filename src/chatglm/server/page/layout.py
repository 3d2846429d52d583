"""What is on the page: components with their names, ranges and order. No behaviour."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ...tokenizer.template import default_max_new_tokens
from ..feedback.records import TAGS
from ..schemas import ChatBody
from .words import word

LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "$", "right": "$", "display": False},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "\\[", "right": "\\]", "display": True},
]


SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "seed")
"""Fields of the API that have a control here, in the order of events' inputs."""


@dataclass(frozen=True)
class Parts:
    """The components that events read and write.

    talk      the open conversation as JSON text, see talk.py; kept by the browser
    language  `en` or `zh`
    rater     the browser's random id
    rated     number of the round whose answer the rating is about; None: the last one
    taken     a question that was taken back, on its way into the box
    models    JSON list of what `model` may be
    """

    talk: Any
    rater: Any
    rated: Any
    taken: Any
    models: Any
    language: Any
    side: Any
    talks: Any
    new: Any
    name: Any
    rename: Any
    delete: Any
    export_markdown: Any
    export_json: Any
    dark: Any
    manage: Any
    settings: Any
    model: Any
    system: Any
    temperature: Any
    top_p: Any
    top_k: Any
    max_tokens: Any
    repetition_penalty: Any
    seed: Any
    reset: Any
    chat: Any
    status: Any
    question: Any
    send: Any
    stop: Any
    regenerate: Any
    undo: Any
    previous: Any
    place: Any
    next: Any
    prefer: Any
    feedback: Any
    feedback_place: Any
    thumb: Any
    rating: Any
    tags: Any
    correction: Any
    comment: Any
    consent: Any
    save_feedback: Any
    delete_feedback: Any
    feedback_status: Any
    warning: Any

    @property
    def sampling(self) -> list[Any]:
        return [getattr(self, name) for name in SAMPLING]

    @property
    def opinion(self) -> list[Any]:
        return [self.thumb, self.rating, self.correction, self.tags, self.comment]


def default_of(field: str) -> float:
    """The API's default, which is the page's too."""
    return float(ChatBody.model_fields[field].default)


def defaults(context: int) -> dict[str, Any]:
    """Values of the sampling components, by name."""
    special = {"max_tokens": default_max_new_tokens(context), "seed": ""}
    return {name: special[name] if name in special else default_of(name) for name in SAMPLING}


def lay_out(t: Any, context: int, models: list[str], *, with_feedback: bool) -> Parts:
    """Build the components inside an open Blocks. `t(key)` gives a text in the browser's language.

    models: what the API serves, the base first.
    """
    found: dict[str, Any] = {}
    standard = defaults(context)
    found["talk"] = gr.Textbox("", visible=False, elem_id="talk")
    found["rater"] = gr.Textbox("", visible=False, elem_id="rater")
    found["rated"] = gr.Number(None, visible=False, precision=0, elem_id="rated")
    found["taken"] = gr.Textbox("", visible=False, elem_id="taken")
    found["models"] = gr.Textbox(json.dumps(models), visible=False, elem_id="models")
    with gr.Sidebar(open=True, width=300, elem_id="side") as found["side"]:
        found["new"] = gr.Button(t("new"), variant="primary", elem_id="new")
        found["model"] = gr.Dropdown(
            models, value=models[0], label=t("model"), filterable=False, visible=len(models) > 1, elem_id="model"
        )
        found["talks"] = gr.Radio([], label=t("conversations"), elem_id="talks")
        with gr.Accordion(t("manage"), open=False, elem_id="manage") as found["manage"]:
            found["name"] = gr.Textbox(label=t("name"), max_lines=1, max_length=80, elem_id="name")
            with gr.Row():
                found["rename"] = gr.Button(t("rename"), size="sm", elem_id="rename")
                found["delete"] = gr.Button(t("delete"), size="sm", variant="stop", elem_id="delete")
            with gr.Row():
                found["export_markdown"] = gr.Button(t("export_markdown"), size="sm", elem_id="export-markdown")
                found["export_json"] = gr.Button(t("export_json"), size="sm", elem_id="export-json")
        with gr.Accordion(t("settings"), open=False, elem_id="settings") as found["settings"]:
            found["system"] = gr.Textbox(
                label=t("system"), placeholder=t("system_hint"), lines=2, max_lines=8, elem_id="system"
            )
            found["temperature"] = gr.Slider(
                0, 2, standard["temperature"], step=0.05, label=t("temperature"), elem_id="temperature"
            )
            found["top_p"] = gr.Slider(0.05, 1, standard["top_p"], step=0.05, label=t("top_p"), elem_id="top-p")
            found["top_k"] = gr.Slider(0, 1000, standard["top_k"], step=1, label=t("top_k"), elem_id="top-k")
            found["max_tokens"] = gr.Slider(
                1, context - 1, standard["max_tokens"], step=1, label=t("max_tokens"), elem_id="max-tokens"
            )
            found["repetition_penalty"] = gr.Slider(
                0.5,
                2,
                standard["repetition_penalty"],
                step=0.05,
                label=t("repetition_penalty"),
                elem_id="repetition-penalty",
            )
            found["seed"] = gr.Textbox(
                "", label=t("seed"), max_lines=1, max_length=20, elem_id="seed"
            )  # an empty number field would send 0
            found["reset"] = gr.Button(t("reset"), size="sm", elem_id="reset")
        found["language"] = gr.Radio([("English", "en"), ("中文", "zh")], label=t("language"), elem_id="language")
        found["dark"] = gr.Button(t("dark"), size="sm", elem_id="dark")
    with gr.Column(elem_id="main-column"):
        found["chat"] = gr.Chatbot(
            label=t("chat"),
            show_label=False,
            elem_id="chat",
            height="100%",
            editable="user",
            buttons=["copy"],
            latex_delimiters=LATEX,
            sanitize_html=True,
            allow_tags=False,
            allow_file_downloads=False,
            feedback_options=["Like", "Dislike"] if with_feedback else None,
            placeholder=t("empty"),
            group_consecutive_messages=False,
        )
        found["status"] = gr.Markdown("", elem_id="status", sanitize_html=True)
        with gr.Row(elem_id="after", equal_height=True):
            found["regenerate"] = gr.Button(
                t("regenerate"), size="sm", min_width=90, interactive=False, elem_id="regenerate"
            )
            found["undo"] = gr.Button(t("undo"), size="sm", min_width=70, interactive=False, elem_id="undo")
            found["previous"] = gr.Button("‹", size="sm", min_width=36, visible=False, elem_id="previous")
            found["place"] = gr.Markdown("", visible=False, elem_id="place")
            found["next"] = gr.Button("›", size="sm", min_width=36, visible=False, elem_id="next")
            found["prefer"] = gr.Button(t("prefer"), size="sm", min_width=110, visible=False, elem_id="prefer")
        with gr.Row(elem_id="ask", equal_height=True):
            found["question"] = gr.Textbox(
                label=t("question"),
                show_label=False,
                placeholder=t("question_hint"),
                lines=1,
                max_lines=8,
                scale=8,
                autofocus=True,
                container=False,
                elem_id="question",
            )
            found["send"] = gr.Button(t("send"), variant="primary", scale=1, min_width=72, elem_id="send")
            found["stop"] = gr.Button(t("stop"), variant="stop", scale=1, min_width=72, visible=False, elem_id="stop")
        with gr.Accordion(t("feedback"), open=False, visible=with_feedback, elem_id="feedback") as found["feedback"]:
            found["consent"] = gr.Checkbox(False, label=t("consent"), elem_id="consent")
            found["feedback_place"] = gr.Markdown("", elem_id="feedback-place")
            with gr.Row():
                found["thumb"] = gr.Radio(thumb_choices("en"), label=t("thumb"), elem_id="thumb", min_width=120)
                found["rating"] = gr.Radio([1, 2, 3, 4, 5], label=t("rating"), elem_id="rating", min_width=240)
            found["tags"] = gr.CheckboxGroup(tag_choices("en"), label=t("tags"), elem_id="tags")
            found["correction"] = gr.Textbox(
                label=t("correction"), placeholder=t("correction_hint"), lines=3, max_lines=12, elem_id="correction"
            )
            found["comment"] = gr.Textbox(label=t("comment"), lines=1, max_lines=4, elem_id="comment")
            with gr.Row():
                found["save_feedback"] = gr.Button(
                    t("save_feedback"), variant="primary", size="sm", elem_id="save-feedback"
                )
                found["delete_feedback"] = gr.Button(t("delete_feedback"), size="sm", elem_id="delete-feedback")
        found["feedback_status"] = gr.Markdown("", elem_id="feedback-status", sanitize_html=True)
        found["warning"] = gr.Markdown(t("warning"), elem_id="warning")
    return Parts(**found)


def tag_choices(language: str) -> list[tuple[str, str]]:
    """Tags with their names."""
    return [(word(f"tag_{tag}", language), tag) for tag in TAGS]


def thumb_choices(language: str) -> list[tuple[str, int]]:
    """Thumbs with their names; words, as not every machine has a font with pictures."""
    return [(word("thumb_up", language), 1), (word("thumb_down", language), -1)]
