"""OpenAI's endpoints: models, completions, chat completions."""

import secrets
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from pytitans.serve.errors import ApiError
from pytitans.serve.generation import Finished, Read, Sampling, Written
from pytitans.serve.schema import (
    MAX_CHOICES,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionFields,
    CompletionRequest,
    ModelInfo,
    ModelList,
    SamplingFields,
)
from pytitans.serve.service import Ask, Service, random_seed
from pytitans.serve.streams import Events, EventStream, until_gone
from pytitans.serve.text import PLAIN_STOP, chat_ids, prompt_ids

COMPLETION_TOKENS = 16  # OpenAI's, where max_tokens is left out
CHAT_TOKENS = 512
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the answer; with `stream`, server-sent events of its chunks",
        "content": {"text/event-stream": {}},
    }
}


def openai_routes(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    this = ModelInfo(id=service.name, created=service.started)

    @routes.get("/models")
    async def models() -> ModelList:
        return ModelList(data=[this])

    @routes.get("/models/{model:path}")
    async def model(model: str) -> ModelInfo:
        check_model(service, model)
        return this

    @routes.post("/completions", response_model=Completion, responses=STREAM)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        prompts = [partial(ids_of, service, prompt) for prompt in listed(body.prompt)]
        ask = ask_of(service, request, body, prompts, COMPLETION_TOKENS)
        return await reply(service, request, body, ask, Form(service, chat=False))

    @routes.post("/chat/completions", response_model=ChatCompletion, responses=STREAM)
    async def chat(request: Request, body: ChatRequest) -> Response:
        messages = [message.plain for message in body.messages]
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        if not service.tokenizer.chat_template:
            body.stop = [*body.stops, PLAIN_STOP]
        prompt = partial(chat_ids, service.tokenizer, messages)
        ask = ask_of(service, request, body, [prompt], CHAT_TOKENS)
        return await reply(service, request, body, ask, Form(service, chat=True))

    return routes


def check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(
            404,
            f"the only model here is {service.name!r}",
            code="model_not_found",
            param="model",
        )


def listed(prompt: str | list[Any]) -> list[Any]:
    """OpenAI's four kinds of prompt -> prompts, each a text or ids."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt


def ids_of(service: Service, prompt: str | list[int], first: bool) -> list[int]:
    return prompt_ids(service.tokenizer, prompt, first) if isinstance(prompt, str) else prompt


def ask_of(
    service: Service,
    request: Request,
    body: CompletionFields,
    prompts: list[Callable[[bool], list[int]]],
    default_tokens: int,
) -> Ask:
    """What is asked, checked. Raises ApiError."""
    check_model(service, body.model)
    n = body.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(400, f"at most {MAX_CHOICES} answers to a request", param="n")
    session = None
    if body.session is not None:
        session = service.store.get(request.state.client, body.session)
    if body.advance and session is None:
        raise ApiError(400, "advance goes with a session", param="advance")
    if body.advance and len(prompts) * n > 1:
        raise ApiError(400, "a session advances by one prompt and one answer", param="advance")
    return Ask(
        prompts=prompts,
        sampling=sampling_of(service, body, default_tokens),
        n=n,
        session=session,
        advance=body.advance,
    )


def sampling_of(service: Service, body: SamplingFields, default_tokens: int) -> Sampling:
    limit = service.settings.max_new_tokens
    if body.max_tokens is not None and body.max_tokens > limit:
        raise ApiError(400, f"max_tokens is at most {limit} here", param="max_tokens")
    return Sampling(
        max_tokens=body.max_tokens or min(default_tokens, limit),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=random_seed() if body.seed is None else body.seed,
        stop=body.stops,
    )


async def reply(
    service: Service, request: Request, body: CompletionFields, ask: Ask, form: "Form"
) -> Response:
    """The whole answer, or its stream. An error before the first token has its status."""
    if not body.stream:
        await until_gone(request, service.complete(ask, form.take))
        return form.whole()
    events = Events(partial(service.complete, ask))
    try:
        await until_gone(request, events.begun())
    except BaseException:
        await events.close()
        raise
    usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(events, form.chunks, partial(form.last, usage))


class Form:
    """Gathers an answer's events and puts them as OpenAI does."""

    def __init__(self, service: Service, chat: bool):
        self.chat = chat
        name = secrets.token_hex(12)
        self.common = {
            "id": f"chatcmpl-{name}" if chat else f"cmpl-{name}",
            "created": int(time.time()),
            "model": service.name,
        }
        self.read, self.written = 0, 0
        self.texts: dict[int, str] = {}
        self.ends: dict[int, Finished] = {}
        self.begun: set[int] = set()

    def take(self, event: Any) -> None:
        match event:
            case Read(tokens):
                self.read += tokens
            case Written(index, text):
                self.texts[index] = self.texts.get(index, "") + text
            case Finished(index, _, tokens):
                self.written += tokens
                self.ends[index] = event

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.read,
            "completion_tokens": self.written,
            "total_tokens": self.read + self.written,
        }

    def whole(self) -> Response:
        choices = []
        for index in sorted(self.ends):
            text = self.texts.get(index, "")
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(
                {"index": index, "finish_reason": self.ends[index].reason, "logprobs": None}
                | (said if self.chat else {"text": text})
            )
        kind = "chat.completion" if self.chat else "text_completion"
        kind_of = ChatCompletion if self.chat else Completion
        answer = {"object": kind, **self.common, "choices": choices, "usage": self.usage}
        return Response(
            kind_of.model_validate(answer).model_dump_json(), media_type="application/json"
        )

    def chunks(self, event: Any) -> Iterable[dict[str, Any]]:
        """What of the event goes into the stream."""
        self.take(event)
        if isinstance(event, Written):
            if self.chat and event.index not in self.begun:
                self.begun.add(event.index)
                yield self.chunk(event.index, {"delta": {"role": "assistant", "content": ""}})
            if event.text:
                said = {"delta": {"content": event.text}} if self.chat else {"text": event.text}
                yield self.chunk(event.index, said)
        elif isinstance(event, Finished):
            said = {"delta": {}} if self.chat else {"text": ""}
            yield self.chunk(event.index, said, event.reason)

    def chunk(self, index: int, said: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, **said, "finish_reason": reason, "logprobs": None}
        return {"object": self.chunk_kind, **self.common, "choices": [choice]}

    @property
    def chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def last(self, usage: bool) -> Iterable[dict[str, Any]]:
        if usage:
            yield {"object": self.chunk_kind, **self.common, "choices": [], "usage": self.usage}
