"""Requests and answers as Neuronpedia's NLA server has them: names, limits, order of fields.

Field names must not change, because clients store answers as they are. Unknown fields are ignored, as on that server.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from nlae_jax.explore.passage import Token
from nlae_jax.runtime.outside import encodable

LIMITS = {
    "max_input_chars": 65536,
    "max_positions_per_request": 512,
    "max_new_tokens": 4096,
    "max_describe_batch": 512,
    "max_description_chars": 8192,
    "max_completion_tokens": 512,
}
_MOST_MESSAGES = 512  # the chat template is rendered twice for each message

# A lone surrogate, which JSON can spell, becomes U+FFFD here, because it could not be encoded in an answer.
Text = Annotated[str, AfterValidator(encodable)]
Description = Annotated[Text, Field(max_length=LIMITS["max_description_chars"])]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Vector = list[Finite]
Temperature = Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)]
NewTokens = Annotated[int, Field(ge=1, le=LIMITS["max_new_tokens"])]
Positions = Annotated[list[int], Field(max_length=LIMITS["max_positions_per_request"])]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Message(BaseModel):
    role: Text
    content: Text = ""
    channel: Text | None = None


def characters(message: Message) -> int:
    """Returns the number of characters in a message's role, content and channel."""
    return len(message.role) + len(message.content) + len(message.channel or "")


class Input(BaseModel):
    """A text or a chat. With both, the chat counts."""

    text: Annotated[Text, Field(max_length=LIMITS["max_input_chars"])] | None = None
    messages: Annotated[list[Message], Field(max_length=_MOST_MESSAGES)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    enable_thinking: bool | None = None


class Sampling(BaseModel):
    """Sampling options. `seed` is an addition of this server: the same request and seed draw the same words."""

    temperature: Temperature = 0.7
    max_new_tokens: NewTokens = 200
    stream: bool = False
    seed: Seed | None = None


class Explain(Input, Sampling):
    positions: Positions | None = None
    reverse: bool = True


class Describe(Sampling):
    activations: Annotated[list[Vector], Field(min_length=1, max_length=LIMITS["max_describe_batch"])]


class Compare(BaseModel):
    activation_a: Vector
    activation_b: Vector
    temperature: Temperature = 0.7
    max_new_tokens: NewTokens = 200
    seed: Seed | None = None


class Score(BaseModel):
    description: Description
    activation: Vector


class Complete(Input):
    completion_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Temperature = 0.7
    stream: bool = False
    seed: Seed | None = None


class PublicInput(BaseModel):
    """The common fields of requests to the public site's endpoints."""

    modelId: str | None = None
    nlaSourceId: str | None = None
    text: Text | None = None
    messages: Annotated[list[Message], Field(max_length=_MOST_MESSAGES)] | None = None
    temperature: Temperature = 0.7
    stream: bool = False
    add_generation_prompt: bool | None = None


class PublicExplain(PublicInput):
    positions: Positions | None = None


class PublicComplete(PublicInput):
    completion_tokens: Annotated[int, Field(ge=0)] = 0


def token_info(token: Token) -> dict[str, Any]:
    """Returns a token as /tokenize has it."""
    return {
        "token": token.text,
        "token_id": token.token_id,
        "position": token.position,
        "fragment_index": token.fragment_index,
        "fragment_count": token.fragment_count,
        "role": token.role,
        "section": token.section,
        "channel": token.channel,
        "message_index": token.message_index,
    }


@dataclasses.dataclass(frozen=True)
class Scored:
    """A description with its scores, as all answers have it."""

    description: str
    mse: float | None
    cos: float | None

    def fields(self) -> dict[str, Any]:
        """Returns the fields of an answer. NaN becomes null."""
        return {"description": self.description, "mse": _number(self.mse), "cosine_similarity": _number(self.cos)}


def explain_result(token: Token, l2_norm: float, scored: Scored) -> dict[str, Any]:
    """Returns one result of /explain."""
    info = token_info(token)
    return {
        "token": info["token"],
        "token_id": info["token_id"],
        "position": info["position"],
        "l2_norm": l2_norm,
        **scored.fields(),
        "generated": False,
        **{
            key: info[key]
            for key in ("fragment_index", "fragment_count", "role", "section", "channel", "message_index")
        },
    }


def _number(value: float | None) -> float | None:
    """Replaces NaN, which JSON does not have, by None."""
    return None if value is None or math.isnan(value) else value
