"""What requests and answers look like; OpenAI's names where OpenAI has one."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    model_validator,
)

MAX_CHOICES = 8
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which is no character") from None
    return text


def number(value: Any) -> Any:
    """1.0 is an integer in JSON; "1" and true are none."""
    if isinstance(value, (str, bool)):
        raise ValueError("Input should be a number")
    return value


Text = Annotated[str, AfterValidator(encodable)]
Title = Annotated[str, Field(max_length=200), AfterValidator(encodable)]
Name = Annotated[str, Field(pattern=NAME, description="letters, digits, `.`, `_` and `-`")]
Whole = Annotated[int, BeforeValidator(number)]
Count = Annotated[int, Field(ge=1), BeforeValidator(number)]
TokenId = Annotated[int, Field(ge=0, strict=True)]  # checked without a call: there are many


class Body(BaseModel):
    """A field that is not known is an error: an option without effect would pass unnoticed."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # accepted, without effect


NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields of OpenAI's that are refused with other values
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "top_logprobs": (None, 0),
}
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier"}


class SamplingFields(Body):
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=True)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None
    seed: Whole | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    @property
    def stops(self) -> list[str]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stop if text]


class CompletionFields(SamplingFields):
    model: Text
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), BeforeValidator(number)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    session: Text | None = Field(None, description="id of a memory session to answer from")
    advance: StrictBool = Field(
        False, description="the session goes on with prompt and answer; else it is left as it was"
    )

    @model_validator(mode="before")
    @classmethod
    def without_the_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name, values in NEUTRAL.items():
            if name in fields and not any(same(fields[name], value) for value in values):
                raise ValueError(f"{name} is not supported by this server: leave it out")
        return {k: v for k, v in fields.items() if k not in WITHOUT_EFFECT | NEUTRAL.keys()}


def same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


class CompletionRequest(CompletionFields):
    """OpenAI's `/v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    )


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None

    @property
    def plain(self) -> dict[str, str]:
        """developer is OpenAI's newer name for system; templates know the older."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(CompletionFields):
    """OpenAI's `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None


class AskRequest(SamplingFields):
    prompt: Annotated[Text, Field(min_length=1)]
    advance: StrictBool = False


class NewSession(Body):
    title: Title = ""
    snapshot: Name | None = Field(None, description="begin with what this snapshot has read")


class ForkRequest(Body):
    title: Title | None = Field(None, description="the session's own if left out")


class ReadRequest(Body):
    text: Text


class SaveRequest(Body):
    name: Name
    overwrite: StrictBool = False


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorFields


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Reply(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: Reply
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class SessionInfo(BaseModel):
    id: str
    object: Literal["session"] = "session"
    title: str
    created: int
    used: int
    tokens: int = Field(description="read so far")
    bytes: int = Field(description="on disk")
    in_memory: bool


class SessionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SessionInfo]
    has_more: bool


class SnapshotInfo(BaseModel):
    id: str
    object: Literal["snapshot"]
    title: str
    created: int
    tokens: int
    bytes: int


class SnapshotList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SnapshotInfo]


class ReadAnswer(BaseModel):
    read: int = Field(description="tokens of this document")
    session: SessionInfo


class AskAnswer(BaseModel):
    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    session: SessionInfo


class Deleted(BaseModel):
    id: str
    deleted: Literal[True] = True


class ModelInfo(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pytitans"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
