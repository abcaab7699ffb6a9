"""Accelerators made of CPU memory, for tests on machines that have none.

A tensor on `sim:0` is computed by the CPU's kernels, so that results can be compared bit for bit, but it is a tensor of
another device: an operation refuses tensors of two devices, and nothing reads its values without a copy. Each device counts
what it holds, what travels, and how often the host waits for one value; it may be given an end of its memory.

    with simulated(2) as devices:
        model.to("sim:0")
        print(devices[0].peak, devices[0].bytes_in)

torch knows the name for the rest of the process, but there are devices only inside `simulated`. The backward pass runs in
the caller's thread there: torch's own threads for devices are as many as there were when it first ran one.
"""

from __future__ import annotations

import itertools
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from accelerate.utils import offload
from safetensors import safe_open
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim"
ROOM = 1 << 40  # bytes of a device whose memory has no end
aten = torch.ops.aten


@dataclass
class Device:
    """What one device holds and has done since `reset`.

    `held` and `peak`: bytes now and at most. `copies_in` and `copies_out`: bytes of a copy from or to anywhere else -> how
    many there were. `reads`: how often the host waited for a value (`.item()`, `bool(tensor)`, a selection by a mask), by operation.
    """

    index: int
    room: int = ROOM
    held: int = 0
    peak: int = 0
    copies_in: Counter[int] = field(default_factory=Counter)
    copies_out: Counter[int] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)

    @property
    def bytes_in(self) -> int:
        """Bytes that came from anywhere else."""
        return sum(size * count for size, count in self.copies_in.items())

    @property
    def bytes_out(self) -> int:
        """Bytes that went anywhere else."""
        return sum(size * count for size, count in self.copies_out.items())

    def reset(self) -> None:
        """Counts from here on; what is held stays held."""
        self.peak = self.held
        for counter in (self.copies_in, self.copies_out, self.reads):
            counter.clear()

    def take(self, size: int) -> None:
        """Holds `size` bytes more, or raises torch.OutOfMemoryError."""
        if size > self.room - self.held:
            raise torch.OutOfMemoryError(
                f"{NAME.upper()} out of memory. Tried to allocate {size} bytes. Device {self.index} holds {self.held} of {self.room}."
            )
        self.held += size
        self.peak = max(self.peak, self.held)


class Memory:
    """A storage on a device: it is held as long as any tensor lies in it."""

    def __init__(self, index: int, storage: torch.UntypedStorage):
        self._size, self._device, self.storage = 0, _devices[index], storage
        self.count()
        self.device = torch.device(NAME, index)
        self._cdata = storage._cdata

    def __del__(self) -> None:
        self._device.held -= self._size

    def count(self) -> None:
        """Takes note of the size, which an operation may have changed."""
        size = self.storage.nbytes()
        self._device.take(max(size - self._size, 0))
        self._device.held -= max(self._size - size, 0)
        self._size = size

    def nbytes(self) -> int:
        return self.storage.nbytes()

    size = __len__ = nbytes

    def data_ptr(self) -> int:
        """An address that is nobody's on the host."""
        address = self.storage.data_ptr()
        return address and _far(address, self.device.index)

    def resizable(self) -> bool:
        return self.storage.resizable()

    def resize_(self, size: int) -> Memory:
        self.storage.resize_(size)
        self.count()
        return self


_devices: list[Device] = []
_memories: WeakValueDictionary[int, Memory] = WeakValueDictionary()  # by the address of the storage's object
_current = 0


def _far(address: int, index: int) -> int:
    return address + (index + 1 << 56)


def place(data: Tensor, index: int) -> SimTensor:
    """A tensor of a device whose values are those of `data`, which nobody else may touch from here on."""
    storage = data.untyped_storage()
    memory = _memories.get(storage._cdata)
    if memory is None:
        memory = _memories[storage._cdata] = Memory(index, storage)
    memory.count()
    tensor = Tensor._make_wrapper_subclass(
        SimTensor,
        data.shape,
        strides=data.stride(),
        storage_offset=data.storage_offset(),
        dtype=data.dtype,
        device=torch.device(NAME, index),
    )
    tensor._data, tensor._memory = data, memory
    return tensor


class SimTensor(Tensor):
    """A tensor on a simulated device, or a parameter; `_data` lies on the CPU and is this file's business only."""

    _data: Tensor
    _memory: Memory

    @staticmethod
    def __new__(cls: Any, data: Tensor, requires_grad: bool = True) -> Any:
        """What `type(parameter)(data)` is for: another parameter, wherever `data` lies."""
        return torch.nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and not torch.is_grad_enabled():  # the CPU has one kernel for it
            return run(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: SimTensor) -> None:
        Tensor.data.__set__(self, value)
        self._data, self._memory = value._data, value._memory

    def untyped_storage(self) -> Memory:
        return self._memory

    def data_ptr(self) -> int:
        address = self._data.data_ptr()
        return address and _far(address, self.device.index)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def set_(self, source: Memory) -> SimTensor:
        return place(torch.empty(0, dtype=self.dtype).set_(source.storage), source.device.index)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = self.detach().clone()
            copy = torch.nn.Parameter(copy) if isinstance(self, torch.nn.Parameter) else copy
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        arguments = (self.detach().cpu(), self.dtype, str(self.device), self.requires_grad)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, arguments

    def __repr__(self, **kwargs: Any) -> str:
        return f"{self._data!r} on {self.device}"


# Operations whose result the host has to wait for.
_READS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "bincount",
    "repeat_interleave",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "_linalg_check_errors",
}
_INDEXED = {
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index",
}  # by tensors that may lie on the host
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}  # not of integers: CUDA has none


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the CPU's memory, if a device could."""
    name = func._opname if hasattr(func, "_opname") else func.__name__
    if name == "_to_copy":
        return _to_copy(args[0], **kwargs)
    if name == "copy_":
        return _copy(*args[:2])
    wanted = kwargs.get("device")
    generator = kwargs.get("generator")
    if wanted is not None:
        kwargs = {**kwargs, "device": "cpu"}
    places: dict[torch.device, None] = {}
    indexed = name in _INDEXED

    def bare(value: Any) -> Any:
        if isinstance(value, SimTensor):
            places[value.device] = None
            return value._data
        if isinstance(value, Tensor):
            if value.ndim:
                places[value.device] = None
            return value
        if type(value) in (list, tuple):
            return type(value)(map(bare, value))
        return value

    inputs, named = [bare(value) for value in args], {key: bare(value) for key, value in kwargs.items()}
    if indexed and torch.device("cpu") in places and isinstance(args[0], SimTensor):
        _count_indices(args, places)
    device = _common(places, name)
    if wanted is not None:
        device = _resolved(wanted)
    if device.type == NAME:
        if generator is not None:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device}'")
        if name in _PRODUCTS and not any(
            x.is_floating_point() or x.is_complex() for x in inputs if isinstance(x, Tensor)
        ):
            raise RuntimeError(f'"{name}" is not implemented for integers on {device}')
        by_mask = indexed and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1])
        if name in _READS or by_mask:
            _devices[device.index].reads[name] += 1
    result = func(*inputs, **named)
    if device.type != NAME or name in ("_local_scalar_dense", "equal"):
        return result
    given = [value for value in itertools.chain(args, kwargs.values()) if isinstance(value, SimTensor)]
    return _placed(result, device.index, {id(value._data): value for value in given})


def _placed(result: Any, index: int, given: dict[int, SimTensor]) -> Any:
    """The results of an operation as tensors of the device; what is written in place is the tensor that was given."""
    if isinstance(result, Tensor):
        if id(result) not in given:
            return place(result, index)
        same = given[id(result)]
        if same.shape != result.shape:  # an `out` that was made larger
            same.data = place(result, index)
        return same
    if isinstance(result, (list, tuple)):
        return type(result)(_placed(value, index, given) for value in result)
    return result


def _common(places: dict[torch.device, None], name: str) -> torch.device:
    """The one device of an operation's tensors."""
    if len(places) > 1:
        both = " and ".join(map(str, places))
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} was given some on {both}")
    return next(iter(places), torch.device("cpu"))


def _count_indices(args: Sequence[Any], places: dict[torch.device, None]) -> None:
    """Lets a tensor be indexed by tensors on the host, as torch does: they travel."""
    for index in args[1]:
        if isinstance(index, Tensor) and not isinstance(index, SimTensor):
            _devices[args[0].device.index].copies_in[index.nbytes] += 1
    if not any(isinstance(value, Tensor) and not isinstance(value, SimTensor) and value.ndim for value in args[2:]):
        places.pop(torch.device("cpu"))


def _resolved(device: Any) -> torch.device:
    device = torch.device(device)
    if device.type != NAME:
        return device
    index = _current if device.index is None else device.index
    if index >= len(_devices):
        raise RuntimeError(f"{NAME}:{index} is no device: there are {len(_devices)}")
    return torch.device(NAME, index)


def _travelled(source: torch.device, target: torch.device, size: int) -> None:
    if source != target:
        if target.type == NAME:
            _devices[target.index].copies_in[size] += 1
        if source.type == NAME:
            _devices[source.index].copies_out[size] += 1


def _to_copy(source: Tensor, *, device: Any = None, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    target = source.device if device is None else _resolved(device)
    data = source._data if isinstance(source, SimTensor) else source
    if target.type == "meta":
        return data.to("meta", dtype)
    result = aten._to_copy.default(data, dtype=dtype, memory_format=memory_format)
    _travelled(source.device, target, result.nbytes)
    return place(result, target.index) if target.type == NAME else result


def _copy(target: Tensor, source: Tensor) -> Tensor:
    into = target._data if isinstance(target, SimTensor) else target
    into.copy_(source._data if isinstance(source, SimTensor) else source)
    _travelled(source.device, target.device, into.nbytes)
    return target


class _Module(types.ModuleType):
    """`torch.sim`: what torch and its users ask of a kind of device."""

    device_count = staticmethod(lambda: len(_devices))
    is_available = staticmethod(lambda: bool(_devices))
    current_device = staticmethod(lambda: _current)
    is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
    is_bf16_supported = staticmethod(lambda: True)
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    get_rng_state_all = staticmethod(lambda: [torch.get_rng_state()])
    set_rng_state = set_rng_state_all = manual_seed = manual_seed_all = staticmethod(lambda *_: None)
    synchronize = empty_cache = staticmethod(lambda *_: None)

    @staticmethod
    def set_device(device: Any) -> None:
        global _current
        _current = device if isinstance(device, int) else _resolved(device).index

    @staticmethod
    @contextmanager
    def device(device: Any) -> Iterator[None]:
        before = _current
        _Module.set_device(device)
        yield
        _Module.set_device(before)

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """(bytes that are free, bytes in all)"""
        index = _current if device is None else device if isinstance(device, int) else _resolved(device).index
        return _devices[index].room - _devices[index].held, _devices[index].room

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        free, whole = _Module.mem_get_info(device)
        return whole - free


_library: torch.library.Library | None = None
_ours = torch.library.Library("aten", "IMPL")


def _register() -> None:
    """Makes the name known to torch, once in a process."""
    global _library
    if _library is None:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(NAME))
        _library = torch.library.Library("_", "IMPL")
        _library.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
        _library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        _ours.impl("_copy_from", lambda source, target, non_blocking=False: _copy(target, source), "PrivateUse1")
        for name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"):
            _lower(name)


def _lower(name: str) -> None:
    """Lets autocast run a product in its dtype."""
    op = getattr(aten, name)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        wide = isinstance(value, SimTensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.get_autocast_dtype(NAME)) if wide else value

    def lowered(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    _ours.impl(name, lowered, "AutocastPrivateUse1")


class _Opened:
    """`safetensors.safe_open`, which knows the devices that there are by name."""

    def __init__(self, file: Any, framework: str, device: Any = "cpu", **options: Any):
        self.device = torch.device(device)
        self.file = safe_open(file, framework, device="cpu" if self.device.type == NAME else device, **options)

    def __enter__(self) -> _Opened:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def get_tensor(self, name: str) -> Tensor:
        return self.file.get_tensor(name).to(self.device)


@contextmanager
def simulated(count: int = 1, room: int = ROOM) -> Iterator[list[Device]]:
    """Gives the process `count` devices of `room` bytes each."""
    global _current
    _register()
    assert not _devices, "simulated devices are there already"
    _devices.extend(Device(index, room) for index in range(count))
    _current = 0
    before, offload.safe_open = offload.safe_open, _Opened
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield list(_devices)
    finally:
        offload.safe_open = before
        _devices.clear()
