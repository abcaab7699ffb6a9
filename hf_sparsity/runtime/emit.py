"""Machine code of products with packed rows, written as LLVM's language by named steps.

The one idea: a byte of the mask tells where the next values belong, so a table with 256 entries says how to spread them.
One step takes a byte of the mask, which is eight weights of a row (bf16 in the picture; the lowest bit is the first weight):

    byte of the mask             0 1 0 0 1 1 0 1            the number of the table's entry; its popcount is 4
    16 bytes of values           a b c d e f g h            the first four are ours, the rest is read for nothing
    shuffled as the entry says   0 a 0 0 b c 0 d            each bf16 in the high half of a float32 lane: its exact value
    times eight activations      x x x x x x x x            fused multiply-adds into lanes that are summed at the end
    values that come next        e f g h ...                the pointer moves on by the popcount

A word of the mask, 64 weights, is eight steps. Several rows at once share the loads of the activations, several vectors
at once share the spreading: that is all the blocking there is. N:M codes are the same with fewer bits a step and a number
of values that is known beforehand. Sums are float32, in lanes and several partial sums, so that additions do not wait for
each other.

A *field* is what describes eight weights: a byte of a mask, or some bits of codes. On CPUs that do 256 bits as twice 128,
one shuffle fills eight lanes of 16 bits, and each half of them is interleaved with zeros; on others one shuffle fills
eight lanes of 32 bits. `Emitter` has a method for each step.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .spec import SLOT, SLOTS, VALUE_BYTES, Spec

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
POINTER, VOID = ir.PointerType(), ir.VoidType()


def _vector(kind: Any, count: int) -> Any:
    """A type of several numbers in one register."""
    return ir.VectorType(kind, count)


def _i64(number: int) -> Any:
    """A constant number of 64 bits."""
    return ir.Constant(I64, number)


def _loop(b: Any, start: Any, stop: Any, step: int, carried: list[Any], body: Any) -> list[Any]:
    """Emits `for index in range(start, stop, step): carried = body(index, carried)`; returns what is carried at last."""
    before, head, inside, after = b.block, *(b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(I64)
    index.add_incoming(start, before)
    phis = [b.phi(value.type) for value in carried]
    for phi, value in zip(phis, carried, strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", index, stop), inside, after)
    b.position_at_end(inside)
    values = body(index, phis)
    index.add_incoming(b.add(index, _i64(step)), b.block)
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return phis


class Emitter:
    """Emits the functions of one kernel into a module; each method is a step and emits what its docstring says."""

    def __init__(self, module: Any, spec: Spec) -> None:
        self.module, self.spec = module, spec
        self.b: Any = None  # the builder of the function that is being emitted
        self.slots: dict[str, Any] = {}  # its job's slots, loaded
        self.halves = 8 // spec.lanes  # registers that eight float32 take
        self.floats = _vector(F32, spec.lanes)

    # ---- what all functions need

    def begin(self, name: str, arguments: list[Any], used: tuple[str, ...]) -> Any:
        """Starts a function of a job and `arguments`, and loads the slots it uses."""
        function = ir.Function(self.module, ir.FunctionType(VOID, [POINTER, *arguments]), name)
        self.b = ir.IRBuilder(function.append_basic_block())
        self.slots = {slot: self.b.load(self.at(function.args[0], _i64(8 * SLOT[slot])), typ=I64) for slot in used}
        return function

    def at(self, pointer: Any, offset: Any) -> Any:
        """A pointer `offset` bytes after another, which may be the number of an address."""
        if pointer.type == I64:
            pointer = self.b.inttoptr(pointer, POINTER)
        return self.b.gep(pointer, [offset], source_etype=I8)

    def intrinsic(self, name: str, result: Any, *arguments: Any) -> Any:
        """Calls a function that LLVM knows by name."""
        known = self.module.globals.get(name)
        if known is None:
            known = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.b.call(known, arguments)

    # ---- the steps of one field

    def word(self, row: Any, index: Any) -> Any:
        """Loads the fields of 64 weights of a row: `index` counts words. Bits after the row's end become zero."""
        at = self.b.add(self.b.mul(row, self.slots["row_bytes"]), self.b.mul(index, _i64(self.spec.field)))
        word = self.b.load(self.at(self.slots["bits"], at), typ=I64, align=1)
        if self.spec.tail:
            last = self.b.icmp_signed("==", index, self.b.sub(self.slots["words"], _i64(1)))
            word = self.b.and_(word, self.b.select(last, self.slots["last_mask"], _i64(-1)))
        return word

    def entry(self, word: Any, number: int) -> Any:
        """The place of a field's entry in the table, in bytes: the field itself, moved four or five bits to the left.

        By `rorx`, which leaves the word as it is; for a shift the compiler would copy it first, which takes 5 % longer.
        """
        turn = (self.spec.field * number - (self.spec.entry_bytes.bit_length() - 1)) % 64
        moved = self.b.asm(ir.FunctionType(I64, [I64]), f"rorxq $${turn}, $1, $0", "=r,r", [word], side_effect=False)
        return self.b.and_(moved, _i64((2**self.spec.field - 1) * self.spec.entry_bytes))

    def count(self, entry: Any) -> Any:
        """The number of values of a field: the bits of its mask, which are those of its place in the table."""
        if self.spec.step:
            return _i64(self.spec.step)
        return self.intrinsic("llvm.ctpop.i64", I64, entry)

    def advance(self, values: Any, count: Any) -> Any:
        """The pointer behind `count` values."""
        return self.b.gep(values, [count], source_etype=ir.IntType(8 * VALUE_BYTES[self.spec.values]))

    def spread(self, values: Any, entry: Any) -> list[Any]:
        """Eight weights as float32 in registers: loads the next values and shuffles them as the table says."""
        kind, b = self.spec.values, self.b
        if kind == "f32":
            return self._spread_singles(values, entry)
        if kind == "i8":
            pair = ir.Constant(_vector(I64, 2), [0, 0])
            pair = b.insert_element(pair, b.load(values, typ=I64, align=1), ir.Constant(I32, 0))
            raw = b.bitcast(pair, _vector(I8, 16))
        else:
            raw = b.load(values, typ=_vector(I8, 16), align=1)
        if kind == "f16":
            return self.split(b.fpext(b.bitcast(self.shuffle(raw, entry), _vector(ir.HalfType(), 8)), _vector(F32, 8)))
        if self.spec.lanes == 4:
            parts = self.into_high_halves(b.bitcast(self.shuffle(raw, entry), _vector(I16, 8)))
        else:
            twice = b.shuffle_vector(raw, raw, self.numbers([*range(16)] * 2))
            order = b.load(self.at(self.slots["table"], entry), typ=_vector(I8, 32), align=32)
            parts = [b.bitcast(self.intrinsic("llvm.x86.avx2.pshuf.b", _vector(I8, 32), twice, order), _vector(I32, 8))]
        if kind == "i8":  # each in the highest byte of its lane: 2^24 times its value, which `finish` undoes
            return [b.sitofp(part, self.floats) for part in parts]
        return [b.bitcast(part, self.floats) for part in parts]

    def into_high_halves(self, eight: Any) -> list[Any]:
        """Eight 16-bit numbers as the high halves of 32-bit ones, whose low halves are zero: two registers."""
        zero = ir.Constant(_vector(I16, 8), [0] * 8)
        orders = [[n for k in range(4 * half, 4 * half + 4) for n in (0, 8 + k)] for half in range(2)]
        return [
            self.b.bitcast(self.b.shuffle_vector(zero, eight, self.numbers(order)), _vector(I32, 4)) for order in orders
        ]

    def _spread_singles(self, values: Any, entry: Any) -> list[Any]:
        """Float32 values: four weights at a time, for more than four values do not fit a shuffle."""
        if self.spec.step:
            low = _i64(self.spec.step // 2)
        else:
            low = self.intrinsic("llvm.ctpop.i64", I64, self.b.and_(entry, _i64(15 * self.spec.entry_bytes)))
        parts = []
        for half, pointer in enumerate((values, self.advance(values, low))):
            raw = self.b.load(pointer, typ=_vector(I8, 16), align=1)
            parts.append(self.b.bitcast(self.shuffle(raw, entry, 16 * half), _vector(F32, 4)))
        return parts if self.spec.lanes == 4 else [self.b.shuffle_vector(*parts, self.numbers(range(8)))]

    def shuffle(self, raw: Any, entry: Any, offset: int = 0) -> Any:
        """16 bytes of values in the order that 16 bytes of an entry give; zero where that says 128 or more."""
        place = self.at(self.at(self.slots["table"], entry), _i64(offset))
        order = self.b.load(place, typ=_vector(I8, 16), align=16)
        return self.intrinsic("llvm.x86.ssse3.pshuf.b.128", _vector(I8, 16), raw, order)

    def split(self, eight: Any) -> list[Any]:
        """Eight float32 as registers of `lanes`."""
        if self.spec.lanes == 8:
            return [eight]
        return [self.b.shuffle_vector(eight, eight, self.numbers(range(4 * h, 4 * h + 4))) for h in range(2)]

    def numbers(self, which: Any) -> Any:
        """A constant vector of int32."""
        return ir.Constant(_vector(I32, len(which)), [*which])

    def multiply_add(self, weights: Any, activations: Any, sum_: Any) -> Any:
        """One fused multiply-add of registers."""
        return self.intrinsic(f"llvm.fma.v{self.spec.lanes}f32", self.floats, weights, activations, sum_)

    # ---- activations in, results out

    def load_eight(self, kind: str, pointer: Any) -> Any:
        """Eight activations as float32."""
        if kind == "bf16":
            wide = self.b.zext(self.b.load(pointer, typ=_vector(I16, 8), align=1), _vector(I32, 8))
            return self.b.bitcast(self.b.shl(wide, ir.Constant(_vector(I32, 8), [16] * 8)), _vector(F32, 8))
        if kind == "f16":
            return self.b.fpext(self.b.load(pointer, typ=_vector(ir.HalfType(), 8), align=1), _vector(F32, 8))
        return self.b.load(pointer, typ=_vector(F32, 8), align=1)

    def load_one(self, pointer: Any) -> Any:
        """One element of the results' dtype as float32: a bias."""
        kind, b = self.spec.io, self.b
        if kind == "bf16":
            return b.bitcast(b.shl(b.zext(b.load(pointer, typ=I16, align=1), I32), ir.Constant(I32, 16)), F32)
        if kind == "f16":
            return b.fpext(b.load(pointer, typ=ir.HalfType(), align=1), F32)
        return b.load(pointer, typ=F32, align=1)

    def store_one(self, result: Any, pointer: Any) -> None:
        """One float32 in the results' dtype, rounded to the nearest, ties to even."""
        kind, b = self.spec.io, self.b
        if kind == "f16":
            result = b.fptrunc(result, ir.HalfType())
        elif kind == "bf16":
            bits = b.bitcast(result, I32)
            odd = b.and_(b.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
            rounded = b.add(b.add(bits, odd), ir.Constant(I32, 0x7FFF))
            quiet = b.or_(bits, ir.Constant(I32, 0x400000))  # rounding must not make infinity of a NaN
            bits = b.select(b.fcmp_unordered("uno", result, result), quiet, rounded)
            result = b.trunc(b.lshr(bits, ir.Constant(I32, 16)), I16)
        b.store(result, pointer, align=1)

    def total(self, sums: list[Any]) -> Any:
        """The sum of all lanes of some registers, in pairs."""
        while len(sums) > 1:
            sums = [self.b.fadd(*sums[i : i + 2]) if i + 1 < len(sums) else sums[i] for i in range(0, len(sums), 2)]
        lanes = [self.b.extract_element(sums[0], ir.Constant(I32, lane)) for lane in range(self.spec.lanes)]
        while len(lanes) > 1:
            lanes = [self.b.fadd(*lanes[i : i + 2]) for i in range(0, len(lanes), 2)]
        return lanes[0]

    def finish(self, row: Any, vector: int, sums: list[Any]) -> None:
        """Writes one result: the sum, times the row's scale, plus its bias."""
        b, size = self.b, VALUE_BYTES[self.spec.io]
        result = self.total(sums)
        if self.spec.values == "i8":
            scale = b.load(self.at(self.slots["scales"], b.mul(row, _i64(4))), typ=F32, align=1)
            result = b.fmul(result, b.fmul(scale, ir.Constant(F32, 2.0**-24)))
        before, there, after = b.block, b.append_basic_block(), b.append_basic_block()
        b.cbranch(b.icmp_signed("==", self.slots["bias"], _i64(0)), after, there)
        b.position_at_end(there)
        added = b.fadd(result, self.load_one(self.at(self.slots["bias"], b.mul(row, _i64(size)))))
        b.branch(after)
        b.position_at_end(after)
        both = b.phi(F32)
        both.add_incoming(result, before)
        both.add_incoming(added, there)
        element = b.add(row, b.mul(self.slots["rows"], _i64(vector)))
        self.store_one(both, self.at(self.slots["y"], b.mul(element, _i64(size))))

    # ---- whole functions

    def emit_product(self) -> None:
        """`rows(job, first, last)`: the products of these rows with all vectors."""
        used = ("y", "wide", "bits", "values", "starts", "bias", "scales", "table", "padded", "words", "row_bytes")
        if self.spec.widened:
            self.emit_widen()
        function = self.begin("rows", [I64, I64], (*used, "last_mask", "rows"))
        _, first, last = function.args
        count = self.spec.rows
        apart = self.b.sdiv(self.b.sub(last, first), _i64(count))  # so that each stream of bytes goes on without a gap

        def together(row: Any, _: Any) -> list[Any]:
            return self.some_rows([self.b.add(row, self.b.mul(apart, _i64(n))) for n in range(count)])

        _loop(self.b, first, self.b.add(first, apart), 1, [], together)
        if count > 1:  # what is left
            rest = self.b.add(first, self.b.mul(apart, _i64(count)))
            _loop(self.b, rest, last, 1, [], lambda row, _: self.some_rows([row]))
        self.b.ret_void()

    def values_of(self, row: Any) -> Any:
        """The pointer to a row's first value."""
        start = self.b.load(self.at(self.slots["starts"], self.b.mul(row, _i64(4))), typ=I32, align=4)
        return self.advance(self.b.inttoptr(self.slots["values"], POINTER), self.b.zext(start, I64))

    def some_rows(self, rows: list[Any]) -> list[Any]:
        """The products of some rows with all vectors, and their results."""
        spec, count = self.spec, len(rows)
        shape = [
            (r, v, s, h)
            for r in range(count)
            for v in range(spec.vectors)
            for s in range(spec.sums)
            for h in range(self.halves)
        ]
        zero = ir.Constant(self.floats, [0.0] * spec.lanes)
        pointers = [self.values_of(r) for r in rows]
        carried = _loop(
            self.b,
            _i64(0),
            self.slots["words"],
            1,
            [*pointers, *[zero] * len(shape)],
            lambda index, state: self.one_word(
                rows, index, state[:count], dict(zip(shape, state[count:], strict=True))
            ),
        )
        sums = dict(zip(shape, carried[count:], strict=True))
        for r in range(count):
            for v in range(spec.vectors):
                self.finish(rows[r], v, [total for (a, b, _, _), total in sums.items() if (a, b) == (r, v)])
        return []

    def one_word(self, rows: list[Any], index: Any, pointers: list[Any], sums: dict[Any, Any]) -> list[Any]:
        """Eight steps over 64 weights of some rows; returns the pointers and sums after them."""
        words = [self.word(row, index) for row in rows]
        here = self.at(self.slots["wide"], self.b.mul(index, _i64(64 * 4 * self.spec.vectors)))
        for number in range(8):
            weights = []
            for r, word in enumerate(words):
                entry = self.entry(word, number)
                weights.append(self.spread(pointers[r], entry))
                pointers[r] = self.advance(pointers[r], self.count(entry))
            for v in range(self.spec.vectors):
                for h in range(self.halves):
                    place = self.at(here, _i64(4 * (64 * v + 8 * number + h * self.spec.lanes)))
                    activations = self.b.load(place, typ=self.floats, align=4)
                    for r in range(len(rows)):
                        key = (r, v, number % self.spec.sums, h)
                        sums[key] = self.multiply_add(weights[r][h], activations, sums[key])
        return [*pointers, *sums.values()]

    def emit_spread(self) -> None:
        """`rows(job, first, last)`: these rows as dense float32 into `y`, each `padded` long."""
        function = self.begin(
            "rows",
            [I64, I64],
            ("y", "bits", "values", "starts", "scales", "table", "padded", "words", "row_bytes", "last_mask"),
        )
        _, first, last = function.args

        def one(row: Any, _: Any) -> list[Any]:
            scale = None
            if self.spec.values == "i8":
                one = self.b.load(self.at(self.slots["scales"], self.b.mul(row, _i64(4))), typ=F32, align=1)
                one = self.b.fmul(one, ir.Constant(F32, 2.0**-24))
                scale = self.b.insert_element(ir.Constant(self.floats, ir.Undefined), one, ir.Constant(I32, 0))
                scale = self.b.shuffle_vector(scale, scale, self.numbers([0] * self.spec.lanes))
            out = self.at(self.slots["y"], self.b.mul(self.b.mul(row, self.slots["padded"]), _i64(4)))

            def words(index: Any, state: list[Any]) -> list[Any]:
                word, pointer = self.word(row, index), state[0]
                here = self.at(out, self.b.mul(index, _i64(256)))
                for number in range(8):
                    entry = self.entry(word, number)
                    for h, part in enumerate(self.spread(pointer, entry)):
                        if scale is not None:
                            part = self.b.fmul(part, scale)
                        self.b.store(part, self.at(here, _i64(4 * (8 * number + h * self.spec.lanes))), align=4)
                    pointer = self.advance(pointer, self.count(entry))
                return [pointer]

            _loop(self.b, _i64(0), self.slots["words"], 1, [self.values_of(row)], words)
            return []

        _loop(self.b, first, last, 1, [], one)
        self.b.ret_void()

    def emit_dense(self) -> None:
        """`rows(job, first, last)`: dense bf16 rows in `values` times one vector; the yardstick of the packed ones."""
        function = self.begin("rows", [I64, I64], ("y", "wide", "values", "bias", "width", "rows"))
        _, first, last = function.args
        keys = [(s, h) for s in range(4) for h in range(self.halves)]

        def one(row: Any, _: Any) -> list[Any]:
            start = self.at(self.slots["values"], self.b.mul(self.b.mul(row, self.slots["width"]), _i64(2)))

            def columns(column: Any, state: list[Any]) -> list[Any]:
                sums = dict(zip(keys, state, strict=True))
                for s in range(4):
                    offset = self.b.add(column, _i64(8 * s))
                    weights = self.dense_eight(self.at(start, self.b.mul(offset, _i64(2))))
                    for h, part in enumerate(weights):
                        place = self.at(
                            self.slots["wide"], self.b.mul(self.b.add(offset, _i64(h * self.spec.lanes)), _i64(4))
                        )
                        activations = self.b.load(place, typ=self.floats, align=4)
                        sums[s, h] = self.multiply_add(part, activations, sums[s, h])
                return list(sums.values())

            zero = ir.Constant(self.floats, [0.0] * self.spec.lanes)
            sums = _loop(self.b, _i64(0), self.slots["width"], 32, [zero] * len(keys), columns)
            self.finish(row, 0, sums)
            return []

        _loop(self.b, first, last, 1, [], one)
        self.b.ret_void()

    def dense_eight(self, pointer: Any) -> list[Any]:
        """Eight dense bf16 as float32 in registers."""
        if self.spec.lanes == 8:
            return [self.load_eight("bf16", pointer)]
        return [
            self.b.bitcast(part, self.floats)
            for part in self.into_high_halves(self.b.load(pointer, typ=_vector(I16, 8), align=1))
        ]

    def emit_widen(self) -> None:
        """`widen(job)`: activations as float32, 64 of each vector side by side; zeros after the end of the rows."""
        self.begin("widen", [], ("x", "wide", "width", "padded"))
        b, size, vectors = self.b, VALUE_BYTES[self.spec.io], self.spec.vectors

        def place(v: int, column: Any) -> Any:
            word, inside = b.udiv(column, _i64(64)), b.urem(column, _i64(64))
            element = b.add(b.mul(word, _i64(64 * vectors)), b.add(inside, _i64(64 * v)))
            return self.at(self.slots["wide"], b.mul(element, _i64(4)))

        for v in range(vectors):

            def copy(column: Any, _: Any, v: int = v) -> list[Any]:
                element = b.add(column, b.mul(self.slots["width"], _i64(v)))
                found = self.load_eight(self.spec.io, self.at(self.slots["x"], b.mul(element, _i64(size))))
                b.store(found, place(v, column), align=4)
                return []

            def clear(column: Any, _: Any, v: int = v) -> list[Any]:
                b.store(ir.Constant(_vector(F32, 8), [0.0] * 8), place(v, column), align=4)
                return []

            _loop(b, _i64(0), self.slots["width"], 8, [], copy)
            _loop(b, self.slots["width"], self.slots["padded"], 8, [], clear)
        b.ret_void()

    def emit_starts(self) -> None:
        """`rows(job, first, last)`: how many values all rows before each have, and at last all, as int32 into `y`."""
        function = self.begin("rows", [I64, I64], ("y", "bits", "words", "row_bytes", "last_mask"))
        _, first, last = function.args

        def place(row: Any) -> Any:
            return self.at(self.slots["y"], self.b.mul(self.b.sub(row, first), _i64(4)))

        def one(row: Any, before: list[Any]) -> list[Any]:
            self.b.store(self.b.trunc(before[0], I32), place(row), align=4)

            def word(index: Any, state: list[Any]) -> list[Any]:
                return [self.b.add(state[0], self.intrinsic("llvm.ctpop.i64", I64, self.word(row, index)))]

            return _loop(self.b, _i64(0), self.slots["words"], 1, before, word)

        total = _loop(self.b, first, last, 1, [_i64(0)], one)
        self.b.store(self.b.trunc(total[0], I32), place(last), align=4)
        self.b.ret_void()

    def emit_run(self, shared: bool) -> None:
        """`run(job)`: activations made float32 where that is needed, then all rows, shared among threads.

        `shared`: whether OpenMP is there.
        """
        outside = self.emit_member() if shared else None
        run = self.begin("run", [], ("threads", "rows"))
        b, job = self.b, run.args[0]
        if "widen" in self.module.globals:
            b.call(self.module.globals["widen"], [job])
        if outside is not None:
            with b.if_then(b.icmp_signed(">", self.slots["threads"], _i64(1))):
                threads = b.trunc(self.slots["threads"], I32)
                b.call(outside, [self.module.globals["member"], job, threads, ir.Constant(I32, 0)])
                b.ret_void()
        b.call(self.module.globals["rows"], [job, _i64(0), self.slots["rows"]])
        b.ret_void()

    def emit_member(self) -> Any:
        """`member(job)`: what each thread of OpenMP's pool does; returns the function that calls them together.

        Fewer threads may come than were asked for: each takes its share, then the shares of those that did not come.
        """
        kinds = {
            "GOMP_parallel": (VOID, [POINTER, POINTER, I32, I32]),
            "omp_get_thread_num": (I32, []),
            "omp_get_num_threads": (I32, []),
        }
        outside = {name: ir.Function(self.module, ir.FunctionType(*kind), name) for name, kind in kinds.items()}
        member = self.begin("member", [], ("threads",))
        b, job = self.b, member.args[0]
        mine = b.zext(b.call(outside["omp_get_thread_num"], []), I64)
        there = b.zext(b.call(outside["omp_get_num_threads"], []), I64)
        before, head, inside, after = b.block, *(b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        share = b.phi(I64)
        share.add_incoming(mine, before)
        b.cbranch(b.icmp_signed("<", share, self.slots["threads"]), inside, after)
        b.position_at_end(inside)
        place = self.at(job, b.mul(b.add(share, _i64(len(SLOTS))), _i64(8)))
        ends = [b.load(self.at(place, _i64(8 * k)), typ=I64) for k in range(2)]
        b.call(self.module.globals["rows"], [job, *ends])
        share.add_incoming(b.add(share, there), inside)
        b.branch(head)
        b.position_at_end(after)
        b.ret_void()
        return outside["GOMP_parallel"]
