"""The operators of backend.Backend on the CPU: an argument block per layer, a job per operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..backend import Plan, Residency
from ..config import POSITION_OFFSET
from ..formats import U8Array
from ..gguf import Tensor
from ..weights import Weights
from . import attention, ffn, ffn_batch, linear, matmul
from .axpy import AXPYS
from .bandwidth import Reader, read_all
from .block import MATRIX, PRODUCTS, SINGLES, SUMS, Block, address, build, matrix
from .elementwise import NORMS
from .gemm import MULTIPLIES, UNPACKS
from .isa import physical_cores
from .jit import Kernel, load_kernels
from .pool import Call, Pool, program
from .rows import DOTS, F16, F32, SLACK, WIDENS, pack_bytes

_JOBS = (
    linear.embed,
    linear.ffn_norm,
    linear.out_add,
    linear.clear_rows,
    linear.pack_rows,
    linear.predict,
    linear.head,
    attention.qkv,
    attention.attend,
    ffn.ffn,
    ffn.audit,
    ffn_batch.ffn_batch,
    read_all,
)


class CPU:
    """Runs a plan on `threads` threads (None: one per physical core)."""

    name = "cpu"

    def __init__(
        self,
        plan: Plan,
        threads: int | None = None,
        notify: Callable[[str], Any] = lambda _: None,
    ) -> None:
        kv_type = F16 if plan.cache.k.dtype == np.float16 else F32
        kernels = [*_JOBS, *_row_kernels(plan.weights, kv_type)]
        load_kernels(kernels, notify, physical_cores())
        self.pool = Pool(threads or physical_cores())
        self.plan = plan
        self._keep: list[np.ndarray] = []  # memory that blocks point to
        self._captured: list[Call] | None = None
        c, w, b, step = plan.config, plan.weights, plan.buffers, plan.step
        n_tok, n_out = len(step.tokens), len(step.outputs)
        q_dim, kv_dim = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
        rank = max((layer.fc1.rows for layer in w.layers if layer.fc1 is not None), default=0)
        standard_down = not w.is_transposed

        # A thread's scratch: what products need, for the FFN with a list of tokens, or scores,
        # or a row of the embedding, or a piece of down.
        # An odd number of cache lines, so that threads do not meet in the same cache sets.
        scratch_bytes = max(
            *(matmul.scratch_bytes(t.cols, max(n_tok, n_out)) for t in w.matrices()),
            matmul.WORK + attention.attend_bytes(c.n_head, c.n_head_kv, c.head_dim, n_tok),
            matmul.WORK + 4 * c.n_embd,
            matmul.WORK + ffn_batch.down_bytes(c.n_embd),
        )
        scratch_bytes = -(-scratch_bytes // 128) * 128 + 64
        scratch = {
            "scratch": self._bytes(self.pool.n_threads * scratch_bytes),
            "scratch_bytes": scratch_bytes,
            "n_threads": self.pool.n_threads,
        }
        packed_embd = {
            "packs": self._bytes(max(n_tok, n_out) * pack_bytes(c.n_embd)),
            "ones": self._keeping(np.ones(64, np.int8)),
        }
        residual_packs = self._bytes(n_tok * pack_bytes(c.n_embd))
        eps = self._keeping(np.array([c.norm_eps], np.float32))

        def norm(weight: Tensor, bias: Tensor | None) -> list[int]:
            kind = NORMS[c.traits.norm]
            shift = None if bias is None else bias.data
            return [kind, address(weight.data), address(shift), address(eps)]

        normed = {"x": b.x, "n_embd": c.n_embd, **packed_embd}
        where = {
            "counts": step.counts,
            "positions": step.positions,
            "rows": step.rows,
            "pages": step.pages,
            "pages_cols": step.pages.shape[1],
        }
        heads = {"n_head": c.n_head, "n_head_kv": c.n_head_kv, "head_dim": c.head_dim}
        n_splits = -(-len(plan.rope) // attention.SPLIT)
        size = len(step.pages) * c.n_head * n_splits * attention.partial_floats(c.head_dim)
        partial = self._floats(size if n_splits > 1 else 0)
        # Falcon's FFN, whose input is made before attention, reads it after: qkv has its own.
        attention_h = self._floats(n_tok, c.n_embd)
        attention_packs = self._bytes(n_tok * pack_bytes(c.n_embd))
        k, v = self._floats(n_tok, kv_dim), self._floats(n_tok, kv_dim)
        a_packs = self._bytes(n_tok * pack_bytes(q_dim))
        hidden = self._floats(n_tok, rank)
        hidden_packs = self._bytes(n_tok * pack_bytes(rank))
        act_packs = self._bytes(n_tok * pack_bytes(c.n_ff) if standard_down else 0)
        neurons = {
            "rows": self._ints(c.n_ff + SLACK),
            "n_rows": self._ints(2),
            "fired": b.fired,
            "wanted": self._bytes(c.n_ff),
            "active": self._ints(n_tok * c.n_ff + SLACK),
            "values": self._floats(n_tok, c.n_ff),
            "n_active": self._ints(n_tok),
            "lanes": self._floats(ffn.LANES, c.n_embd),
            "arrived": self._bytes(64 * (c.n_embd // ffn.MIN_COLUMNS + 1)),
        }
        audit_act = self._floats(c.n_ff)
        scale = self._keeping(np.array([1 / np.sqrt(c.head_dim)], np.float32))
        activation_threshold = self._keeping(np.array([c.activation_threshold], np.float32))

        self._embed = build(
            linear.EMBED,
            counts=step.counts,
            tokens=step.tokens,
            positions=step.positions,
            offset=POSITION_OFFSET,
            x=b.x,
            embd=matrix(w.embd, use=SINGLES),
            table=matrix(w.positions, use=SINGLES),
            **scratch,
        )
        self._head = build(
            linear.HEAD,
            counts=step.counts,
            outputs=step.outputs,
            norm=norm(w.output_norm, w.output_norm_bias),
            h=self._floats(n_out, c.n_embd),
            logits=b.logits,
            output=matrix(w.output),
            **normed,
            **scratch,
        )
        self._pack_h = build(linear.PACK, counts=step.counts, x=b.h, n=c.n_embd, **packed_embd)
        self._qkv: list[Block] = []
        self._attend: list[Block] = []
        self._out_add: list[Block] = []
        self._ffn_norm: list[Block] = []
        self._predict: list[Block] = []
        self._ffn: list[Block] = []
        self._audit: list[Block] = []
        for il, layer in enumerate(w.layers):
            cache = {"k_cache": plan.cache.k[il], "v_cache": plan.cache.v[il], "kv_type": kv_type}
            self._qkv.append(
                build(
                    attention.QKV,
                    norm=norm(layer.attn_norm, layer.attn_norm_bias),
                    h=attention_h,
                    q=b.q,
                    k=k,
                    v=v,
                    rope=plan.rope,
                    rope_half=plan.rope.shape[2],
                    is_neox=c.traits.rope == "neox",
                    wq=matrix(layer.wq, layer.bq),
                    wk=matrix(layer.wk, layer.bk),
                    wv=matrix(layer.wv, layer.bv),
                    **where,
                    **(normed | {"packs": attention_packs}),
                    **heads,
                    **cache,
                    **scratch,
                )
            )
            self._attend.append(
                build(
                    attention.ATTEND,
                    q=b.q,
                    a=b.a,
                    scale=scale,
                    partial=partial,
                    n_splits_max=n_splits,
                    dots=DOTS[kv_type].address,
                    unpack=UNPACKS[kv_type].address,
                    multiply=MULTIPLIES[kv_type].address,
                    axpys=AXPYS[kv_type].address,
                    widen=WIDENS[kv_type].address,
                    **where,
                    **heads,
                    **cache,
                    **scratch,
                )
            )
            self._out_add.append(
                build(
                    linear.OUT,
                    counts=step.counts,
                    a=b.a,
                    packs=a_packs,
                    ones=packed_embd["ones"],
                    x=b.x,
                    wo=matrix(layer.wo, layer.bo),
                    **scratch,
                )
            )
            self._ffn_norm.append(
                build(
                    linear.FFN_NORM,
                    counts=step.counts,
                    norm=norm(layer.ffn_norm, layer.ffn_norm_bias),
                    h=b.h,
                    **normed,
                )
            )
            if layer.fc1 is not None and layer.fc2 is not None:
                is_normed = c.predictor_input == "normed"
                self._predict.append(
                    build(
                        linear.PREDICT,
                        counts=step.counts,
                        rows=step.rows,
                        x=b.h if is_normed else b.x,
                        packs=packed_embd["packs"] if is_normed else residual_packs,
                        is_packed=is_normed,  # by ffn_norm
                        ones=packed_embd["ones"],
                        hidden=hidden,
                        hidden_packs=hidden_packs,
                        scores=b.scores,
                        mask=b.mask,
                        thresholds=step.thresholds[:, il:],
                        n_layer=c.n_layer,
                        fc1=matrix(layer.fc1),
                        fc2=matrix(layer.fc2, layer.fc2_bias),
                        **scratch,
                    )
                )
            down = layer.down if layer.down_t is None else layer.down_t
            assert down is not None
            self._ffn.append(
                build(
                    ffn.FFN,
                    counts=step.counts,
                    h=b.h,
                    mask=b.mask,
                    has_mask=plan.mode == "predicted",
                    is_dense=plan.mode == "dense",
                    act=b.act,
                    activation=ffn.ACTIVATIONS[c.activation],
                    threshold=activation_threshold,
                    x=b.x,
                    down_bias=0 if layer.down_bias is None else layer.down_bias.data,
                    totals=b.counts[il],
                    act_packs=act_packs,
                    is_transposed=layer.down_t is not None,
                    is_part=0,
                    exchange=0,
                    decider=matrix(layer.decider, layer.decider_bias),
                    up=matrix(layer.up, layer.up_bias),
                    # Its bias goes to the matmul in the standard layout only.
                    down=matrix(down, layer.down_bias, PRODUCTS)
                    if layer.down_t is None
                    else matrix(down, None, SUMS),
                    **packed_embd,
                    **neurons,
                    **scratch,
                )
            )
            self._audit.append(
                build(
                    ffn.AUDIT,
                    token=step.audit,
                    h=b.h,
                    packs=packed_embd["packs"],
                    activation=ffn.ACTIVATIONS[c.activation],
                    threshold=activation_threshold,
                    act=audit_act,
                    truth=b.truth,
                    decider=matrix(layer.decider, layer.decider_bias),
                    up=matrix(layer.up, layer.up_bias),
                    **scratch,
                )
            )

    def _keeping(self, array: np.ndarray) -> np.ndarray:
        self._keep.append(array)
        return array

    def _bytes(self, n: int) -> np.ndarray:
        """Return `n` bytes at a multiple of 64."""
        memory = self._keeping(np.zeros(n + 64, np.uint8))
        start = -memory.ctypes.data % 64
        return memory[start : start + n]

    def _floats(self, *shape: int) -> np.ndarray:
        return self._bytes(4 * int(np.prod(shape))).view(np.float32).reshape(shape)

    def _ints(self, *shape: int) -> np.ndarray:
        return self._bytes(4 * int(np.prod(shape))).view(np.int32).reshape(shape)

    def _run(self, job: Kernel, block: Block) -> None:
        call = (job.address, address(block))
        if self._captured is None:
            self.pool.run(program([call]))
        else:
            self._captured.append(call)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        # Between two jobs of a token Python takes longer than its share: what it runs through has
        # left the caches every time, weights having gone through them.
        jobs = program(self.calls(run))
        return lambda: self.pool.run(jobs)

    def calls(self, run: Callable[[], Any]) -> list[Call]:
        """Return the jobs that `run`, which calls operators, asks for with a step of one token."""
        calls: list[Call] = []
        outer, self._captured = self._captured, calls
        try:
            run()
        finally:
            self._captured = outer
        return calls

    def residency(self) -> None:
        """All neurons are in one place."""

    def use(self, text: Residency | None) -> None:
        """See residency()."""

    def embed(self) -> None:
        self._run(linear.embed, self._embed)

    def qkv(self, il: int) -> None:
        self._run(attention.qkv, self._qkv[il])

    def attend(self, il: int) -> None:
        self._run(attention.attend, self._attend[il])

    def out_add(self, il: int) -> None:
        self._run(linear.out_add, self._out_add[il])

    def ffn_norm(self, il: int) -> None:
        self._run(linear.ffn_norm, self._ffn_norm[il])

    def predict(self, il: int) -> None:
        self._run(linear.predict, self._predict[il])

    def ffn(self, il: int) -> None:
        self._run_ffn(self._ffn[il])

    def _run_ffn(self, block: Block) -> None:
        self._run(ffn.ffn if self._is_one() else ffn_batch.ffn_batch, block)

    def _is_one(self) -> bool:
        return self._captured is not None or self.plan.step.n_tok == 1

    def show(self) -> None:
        """All operators work in plan.buffers, and have finished when they return."""

    def take_mask(self, il: int) -> None:
        """See show()."""

    def finish(self) -> None:
        """See show()."""

    def be_part(
        self, layers: Sequence[int], rows: np.ndarray, n_rows: np.ndarray, out: np.ndarray
    ) -> None:
        """Let ffn_part(il) set `out` [n_tok, n_embd] to what some of the neurons give, no bias.

        For another backend that has the others of these layers. It makes buffers.h, and what is
        to be computed: of one token rows, int32 [n_ff + SLACK], and n_rows, int32 [2], whose first
        number says how many; of several buffers.mask.
        """
        n_embd = out.shape[1]
        self._clear_part = build(linear.CLEAR, counts=self.plan.step.counts, x=out, n=n_embd)
        for il in layers:
            block = self._ffn[il]
            for name, array in (("rows", rows), ("n_rows", n_rows), ("x", out)):
                block[getattr(ffn.FFN, name)] = address(array)
            block[ffn.FFN.is_part] = block[ffn.FFN.has_mask] = 1
            block[ffn.FFN.is_dense] = 0
            block[ffn.FFN.down_bias] = block[ffn.FFN.down + MATRIX.bias] = 0

    def ffn_part(self, il: int, exchange: Block | None = None) -> None:
        """See be_part(); `exchange`: what a captured one waits for and answers (exchange.py).

        The caller keeps that alive.
        """
        block = self._ffn[il]
        if not self._is_one():  # for one token ffn does this itself
            self._run(linear.clear_rows, self._clear_part)
            self.pack_h()
        elif exchange is not None:
            block = self._keeping(block.copy())
            block[ffn.FFN.exchange] = address(exchange)
        self._run_ffn(block)

    def pack_h(self) -> None:
        """Round buffers.h, made by another backend, as ffn and audit want it."""
        self._run(linear.pack_rows, self._pack_h)

    def ffn_block(self, il: int) -> Block:
        """Return the argument block of a layer's FFN (ffn.FFN), for benchmarks."""
        return self._ffn[il]

    def audit(self, il: int) -> None:
        self._run(ffn.audit, self._audit[il])

    def head(self) -> None:
        self._run(linear.head, self._head)

    def bound(self, data: U8Array, nbytes: float, tokens: float) -> float:
        return Reader(data).measure(self.pool.n_threads) / nbytes

    def close(self) -> None:
        self.pool.close()


def _row_kernels(w: Weights, kv_type: int) -> list[Kernel]:
    """Return the kernels of the formats in a model and its cache, for what is done with each."""
    singles, sums = [w.embd, w.positions], [layer.down_t for layer in w.layers]
    others = {id(t) for t in (*singles, *sums)} - {id(w.output)}
    products = [t for t in w.matrices() if id(t) not in others]
    kernels = []
    for tensors, use in ((singles, SINGLES), (sums, SUMS), (products, PRODUCTS)):
        types = {int(t.type) for t in tensors if t is not None} | {kv_type}
        kernels += [table[t] for t in sorted(types) for table in use if t in table]
    return kernels
