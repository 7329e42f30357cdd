"""What every step of a decoder shares: lengths, positions, masks, and the cache's own tensors."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from surgeon.emit.ort.build import Builder

BATCH, NEW, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)
"""Names of dynamic sizes, as onnxruntime-genai and Optimum write them."""

IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"


@dataclass(frozen=True)
class Slot:
    """The cache of one attention.

    Attributes:
        number: of the attention, counted from 0 without gaps.
        kv_heads: heads of keys and values.
        key: width of a key head.
        value: width of a value head.
        shared: whether past and present may be one buffer.
    """

    number: int
    kv_heads: int
    key: int
    value: int
    shared: bool


class Steps:
    """Values of the graph that depend on token ids and mask alone, each made once."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.ids = b.input(IDS, "i64", (BATCH, NEW))
        self.mask = b.input(MASK, "i64", (BATCH, TOTAL))
        self.slots: list[Slot] = []
        self._presents: list[ir.Value] = []
        self._known: dict[object, ir.Value] = {}

    # --- the cache -------------------------------------------------------------------------------

    def slot(
        self, kv_heads: int, key: int, value: int, *, shared: bool
    ) -> tuple[Slot, ir.Value, ir.Value]:
        """Returns a new slot, its past keys and its past values."""
        b, number = self.b, len(self.slots)
        made = Slot(number, kv_heads, key, value, shared)
        self.slots.append(made)
        past = [
            b.input(f"past_key_values.{number}.{name}", b.float, (BATCH, kv_heads, PAST, width))
            for name, width in (("key", key), ("value", value))
        ]
        return made, past[0], past[1]

    def present(self, slot: Slot, key: ir.Value, value: ir.Value) -> None:
        """Makes these the slot's outputs."""
        for tensor, width in ((key, slot.key), (value, slot.value)):
            tensor.shape = ir.Shape((BATCH, slot.kv_heads, TOTAL, width))
            self._presents.append(tensor)

    @property
    def presents(self) -> list[ir.Value]:
        """The outputs of all slots, in order."""
        return self._presents

    # --- lengths and positions -------------------------------------------------------------------

    def last_key(self) -> ir.Value:
        """Returns [B] int32: how many tokens each row has in all, less one."""
        if "last" not in self._known:
            b = self.b
            count = b.node("ReduceSum", [self.mask, b.ints(1)], {"keepdims": 0})
            last = b.node("Sub", [count, b.ints(1)])
            self._known["last"] = b.node("Cast", [last], {"to": ir.DataType.INT32}, dtype="i32")
        return self._known["last"]

    def total(self) -> ir.Value:
        """Returns [1] int32: past and new places."""
        if "total" not in self._known:
            b = self.b
            size = b.node("Shape", [self.mask], {"start": 1, "end": 2})
            self._known["total"] = b.node("Cast", [size], {"to": ir.DataType.INT32}, dtype="i32")
        return self._known["total"]

    def _places(self, like: ir.Value, name: str) -> ir.Value:
        """Returns 1, 2, 3, … along the second dimension of an integer value [B, L]."""
        if name not in self._known:
            b = self.b
            ones = b.cast(b.node("Equal", [like, like], dtype="bool"), "i64")
            self._known[name] = b.node("CumSum", [ones, b.const(1, "i64")])
            self._known[name + " in all"] = b.node("ReduceSum", [ones, b.ints(1)], {"keepdims": 1})
        return self._known[name]

    def query_places(self) -> ir.Value:
        """Returns [B, S]: the place of every new token among past and new ones, from 0."""
        if "queries" not in self._known:
            b = self.b
            self._places(self.mask, "keys")
            new = self._places(self.ids, "new")
            past = b.node("Sub", [self._known["keys in all"], self._known["new in all"]])
            before = b.node("Sub", [past, b.ints(1)])
            self._known["queries"] = b.node("Add", [new, before])
        return self._known["queries"]

    def _counts(self) -> tuple[ir.Value, ir.Value]:
        """Returns [B, T] and [B, S]: tokens up to and with every place, and every new token's."""
        if "counts" not in self._known:
            b = self.b
            counts = b.node("CumSum", [self.mask, b.const(1, "i64")])
            self._known["counts"] = counts
            new = b.node("GatherElements", [counts, self.query_places()], {"axis": 1})
            self._known["new counts"] = new
        return self._known["counts"], self._known["new counts"]

    def positions(self) -> ir.Value:
        """Returns [B, S]: the position of every new token, padding not counted."""
        if "positions" not in self._known:
            b = self.b
            less = b.node("Sub", [self._counts()[1], b.ints(1)])
            # Padding before the first token would get -1.
            self._known["positions"] = b.node("Max", [less, b.ints(0)])
        return self._known["positions"]

    def visible(self, window: int | None) -> ir.Value:
        """Returns [B, 1, S, T] bool: which key each new token sees.

        A padded query sees itself, so that its softmax is over something.
        """
        key = ("visible", window)
        if key not in self._known:
            b = self.b
            places = b.node("Sub", [self._places(self.mask, "keys"), b.ints(1)])
            keys = b.node("Unsqueeze", [places, b.ints(1, 2)])
            queries = b.node("Unsqueeze", [self.query_places(), b.ints(1, 3)])
            seen = b.node("LessOrEqual", [keys, queries], dtype="bool")
            if window is not None:
                # Windows are counted in tokens: there may be padding between them.
                counts, new = self._counts()
                first = b.node("Unsqueeze", [b.node("Sub", [new, b.ints(window)]), b.ints(1, 3)])
                near = b.node("Greater", [b.node("Unsqueeze", [counts, b.ints(1, 2)]), first],
                              dtype="bool")  # fmt: skip
                seen = b.node("And", [seen, near])
            real = b.node("Unsqueeze", [b.cast(self.mask, "bool"), b.ints(1, 2)])
            seen = b.node("And", [seen, real])
            itself = b.node("Equal", [keys, queries], dtype="bool")
            self._known[key] = b.node("Or", [seen, itself])
        return self._known[key]

    def refusal(self) -> ir.Value:
        """Returns [B, 1, 1] of the graph's type: 0, or NaN where a row begins with padding.

        GroupQueryAttention counts a row's tokens from its left and would read padding as tokens.
        A graph can't raise, so it answers with what nobody can mistake for an answer.
        """
        if "refusal" not in self._known:
            b = self.b
            first = b.node("Slice", [self.mask, b.ints(0), b.ints(1), b.ints(1)])
            real = b.cast(b.node("Unsqueeze", [first, b.ints(2)]), "bool")
            sides = (b.const(0.0, b.float), b.const(float("nan"), b.float))
            self._known["refusal"] = b.node("Where", [real, *sides], dtype=b.float)
        return self._known["refusal"]
