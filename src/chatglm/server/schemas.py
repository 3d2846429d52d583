"""What a client may send: every field acts, or is refused by name. Ranges as in docs/serving.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .api_errors import shown


def _whole(value: object) -> object:
    """1.0 is 1; true is not a number."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


Whole = Annotated[int, BeforeValidator(_whole)]

MAX_TOKENS = 1_000_000
"""An upper bound for the schema; the model's own context is checked when it is known."""


def refuse(message: str, code: str = "invalid_value") -> PydanticCustomError:
    """An error with a code of ours; braces in user data are kept as they are."""
    return PydanticCustomError(code, "{text}", {"text": message})


class Body(BaseModel):
    """Strict: unknown fields and loose types are refused. `null` stands for an absent field at the top level."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """How a stream reports usage."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampling(Body):
    """Fields that chat and plain completions share."""

    model: str = Field(max_length=256)
    max_tokens: Whole | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float = Field(0.95, ge=0, le=2)
    top_p: float = Field(0.7, gt=0, le=1)
    top_k: Whole = Field(0, ge=0, le=1000)
    min_p: float = Field(0.0, ge=0, lt=1)
    n: Whole = Field(1, ge=1, le=16)
    seed: Whole | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Any = Field(None, description="a string, or an array of 1 to 4 strings of 1 to 256 characters")
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    no_repeat_ngram_size: Whole = Field(0, ge=0, le=64)
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=1024)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: Whole = Field(0, ge=0, le=MAX_TOKENS)
    user: str | None = Field(None, max_length=256)
    structured_outputs: dict[str, Any] | None = Field(
        None, description="exactly one of regex, choice, json, grammar (Lark)"
    )

    @field_validator("stop")
    @classmethod
    def check_stop(cls, value: object) -> tuple[str, ...]:
        strings = [value] if isinstance(value, str) else value
        if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
            raise refuse("must be a string or an array of strings", "invalid_type")
        if not 1 <= len(strings) <= 4 or not all(1 <= len(text) <= 256 for text in strings):
            raise refuse("must be 1 to 4 strings of 1 to 256 characters each")
        return tuple(strings)

    @field_validator("logit_bias")
    @classmethod
    def check_bias(cls, value: dict[str, float]) -> dict[str, float]:
        for key, bias in value.items():
            if not key.isascii() or not key.isdecimal():
                raise refuse(f"has the key {shown(key)}; keys are token ids as decimal strings")
            if not -100 <= bias <= 100:
                raise refuse(f"has {bias:g} for {key}; a bias is from -100 to 100")
        return value

    @field_validator("structured_outputs")
    @classmethod
    def check_structure(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        known = ("regex", "choice", "json", "grammar")
        if value is None:
            return None
        if len(value) != 1 or next(iter(value)) not in known:
            raise refuse(
                f"must hold exactly one of {', '.join(known)}; it holds {shown(list(value))}", "invalid_grammar"
            )
        (kind, content), *_ = value.items()
        if kind == "choice":
            is_list = isinstance(content, list) and all(isinstance(text, str) and text for text in content)
            if not is_list or not 1 <= len(content) <= 256:
                raise refuse("choice must be an array of 1 to 256 strings that are not empty", "invalid_grammar")
        elif kind != "json" and not (isinstance(content, str) and content):
            raise refuse(f"{kind} must be a string that is not empty", "invalid_grammar")
        elif kind == "json" and not isinstance(content, dict):
            raise refuse("json must be a JSON schema (an object)", "invalid_grammar")
        return value

    @model_validator(mode="after")
    def check_stream_options(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options is given without stream: true")
        return self


class FunctionCall(Body):
    """A call that an earlier answer made."""

    name: str
    arguments: str


class ToolCall(Body):
    """As the server sent it."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message. Its content is a string, or an array of text parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = Field(None, description="a string, or an array of {type: text, text: …}")
    name: str | None = Field(None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(None, max_length=64)
    tool_call_id: str | None = Field(None, max_length=256)
    refusal: None = None

    @model_validator(mode="after")
    def check_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise refuse("content is missing or null; it must be a string", "invalid_type")
        return self

    @field_validator("content")
    @classmethod
    def read_content(cls, value: object) -> str | None:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise refuse("must be a string or an array of text parts", "invalid_type")
        texts: list[str] = []
        for part in value:
            if part.get("type") != "text":
                raise refuse(
                    f"has a part of type {shown(part.get('type'))}; this model reads text only", "unsupported_value"
                )
            if not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
                raise refuse("has a text part that is not {type, text}", "invalid_type")
            texts.append(part["text"])
        return "".join(texts)


class Function(Body):
    """A function that the model may call. `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str = Field("", max_length=4096)
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object"})
    strict: bool | None = None


class Tool(Body):
    """A tool; functions only."""

    type: Literal["function"]
    function: Function


class JsonSchema(Body):
    """A named schema of response_format."""

    name: str = Field("answer", max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """text, json_object, or json_schema with its schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refuse("json_schema belongs to type json_schema, and to nothing else")
        return self


class ChatBody(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=512)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=64)
    tool_choice: Any = Field(None, description="none, auto, required, or {type: function, function: {name}}")
    parallel_tool_calls: Literal[False] = False
    truncation: Literal["auto", "disabled"] = "auto"

    @model_validator(mode="after")
    def check_together(self) -> ChatBody:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise refuse(
                f"max_tokens is {self.max_tokens}, max_completion_tokens {self.max_completion_tokens}; they must agree"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs is given without logprobs: true")
        if self.messages[-1].role not in ("user", "tool"):
            raise refuse(f"messages ends with role {self.messages[-1].role}; the last must be user or tool")
        structured = self.response_format is not None and self.response_format.type != "text"
        if self.structured_outputs is not None and structured:
            raise refuse("structured_outputs and response_format exclude each other")
        if self.tools and self.forced_tool != "none" and (self.structured_outputs is not None or structured):
            raise refuse("tools exclude response_format and structured_outputs, unless tool_choice is none")
        return self

    @field_validator("tool_choice")
    @classmethod
    def check_choice(cls, value: object) -> object:
        if value in (None, "none", "auto", "required"):
            return value
        if isinstance(value, dict) and set(value) == {"type", "function"} and value["type"] == "function":
            function = value["function"]
            if isinstance(function, dict) and set(function) == {"name"} and isinstance(function["name"], str):
                return value
        raise refuse("must be none, auto, required or {type: function, function: {name}}")

    @property
    def forced_tool(self) -> str:
        """none, auto, required, or the name of a function behind a colon."""
        if self.tool_choice is None:
            return "auto" if self.tools else "none"
        if isinstance(self.tool_choice, dict):
            return ":" + str(self.tool_choice["function"]["name"])
        return str(self.tool_choice)

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens


class CompletionBody(Sampling):
    """`POST /v1/completions`."""

    prompt: Any = Field(description="a string, up to 64 strings, ids, or arrays of ids")
    max_tokens: Whole | None = Field(16, ge=1, le=MAX_TOKENS)
    logprobs: Whole | None = Field(None, ge=0, le=5)
    echo: bool = False
    suffix: str | None = None
    infill: bool = False
    allow_special: bool = False

    @model_validator(mode="after")
    def check_echo(self) -> CompletionBody:
        if self.echo and self.logprobs is not None:
            raise refuse("echo with logprobs is refused: tokens of a bidirectional context have no log-probabilities")
        if self.suffix is not None:
            raise refuse(
                "suffix is refused: this model continues text; use infill: true with [MASK]", "unsupported_value"
            )
        return self


class EmbeddingBody(Body):
    """`POST /v1/embeddings`."""

    model: str = Field(max_length=256)
    input: Any = Field(description="a string, up to 256 strings, ids, or arrays of ids")
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = Field(None, max_length=256)


class TokenizeBody(Body):
    """`POST /tokenize`."""

    model: str | None = None
    text: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=512)
    add_special: bool = False

    @model_validator(mode="after")
    def check_one(self) -> TokenizeBody:
        if (self.text is None) == (self.messages is None):
            raise refuse("exactly one of text and messages must be given", "missing_field")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Whole] = Field(max_length=1_000_000)


class LegacyBody(BaseModel):
    """The original's `POST /`: unknown fields are ignored, as it did."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    prompt: str
    history: list[tuple[str, str]] = Field(default_factory=list, max_length=512)
    max_length: Whole = Field(2048, ge=1, le=MAX_TOKENS)
    top_p: float = Field(0.7, gt=0, le=1)
    temperature: float = Field(0.95, ge=0, le=2)

    @field_validator("history", mode="before")
    @classmethod
    def pairs(cls, value: object) -> object:
        return [tuple(pair) if isinstance(pair, list) else pair for pair in value] if isinstance(value, list) else value
