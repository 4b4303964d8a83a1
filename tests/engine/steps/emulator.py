"""A StepDevice on the CPU that holds whoever uses it to what a GPU would want, ordering and lifetimes.

* A copy may run as late as the wait for an event recorded behind it: what it leaves from must not change until then.
* A graph is the list of operations that ran as it was captured, Triton's launches among them, on the memory that they
  ran on: what the host has learned since does not reach it, and memory that was given back in between is an error.
* What blocks the host until the device is through is an error in a capture, and where it is forbidden.

Everything runs at once; nothing here takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

#: What they are called depends on whether inference mode is on.
_WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}


@dataclass
class _Copy:
    number: int
    source: torch.Tensor
    was: torch.Tensor


@dataclass
class Emulator:
    """The device. `done` tells what was asked of it, in order."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    done: list[str] = field(default_factory=list)
    num_copies: int = 0
    _pending: list[_Copy] = field(default_factory=list)

    def pinned(self, num_words: int) -> torch.Tensor:
        self.done.append(f"pinned {num_words}")
        return torch.full((num_words,), -12345)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.num_copies += 1
        self.done.append(f"copy {self.num_copies}")
        self._pending.append(_Copy(self.num_copies, source, source.clone()))
        target.copy_(source)

    def event(self) -> EmulatedEvent:
        return EmulatedEvent(self)

    def capture(self, work: Callable[[], None]) -> EmulatedGraph:
        self.done.append("capture")
        recorder = _Recorder()
        with recorder, recorder.launches():
            work()
        for target, was in reversed(recorder.written):  # a capture does not run
            target.copy_(was)
        return EmulatedGraph(self, recorder.operations)

    @contextmanager
    def forbid_waits(self) -> Iterator[None]:
        with _NoWaits():
            yield

    def synchronize(self) -> None:
        self.reach(self.num_copies)

    def reach(self, number: int) -> None:
        """Be through with everything up to that copy."""
        for copy in [copy for copy in self._pending if copy.number <= number]:
            assert torch.equal(copy.source, copy.was), f"what copy {copy.number} leaves from changed before it ran"
            self._pending.remove(copy)


@dataclass
class EmulatedEvent:
    """An event; how far the device was when it was recorded."""

    emulator: Emulator
    number: int = 0

    def record(self) -> None:
        self.number = self.emulator.num_copies

    def synchronize(self) -> None:
        self.emulator.done.append(f"wait {self.number}")
        self.emulator.reach(self.number)


@dataclass(frozen=True)
class _Place:
    """A tensor that was there before the capture, by where it lies."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Place:
        where = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        return cls(StorageWeakRef(tensor.untyped_storage()), tensor.dtype, *where)

    def tensor(self) -> torch.Tensor:
        storage = None if self.storage.expired() else torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise AssertionError(f"a graph is launched whose memory was given back: {self.dtype} {self.shape}")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)


@dataclass(frozen=True)
class _Operation:
    run: Callable[..., Any]
    args: Any
    outputs: list[torch.Tensor]  #: in the graph's own memory


@dataclass
class EmulatedGraph:
    """The operations of a capture."""

    emulator: Emulator
    operations: list[_Operation]

    def launch(self) -> None:
        self.emulator.done.append("launch")
        for operation in self.operations:
            args, kwargs = tree_map(lambda arg: arg.tensor() if isinstance(arg, _Place) else arg, operation.args)
            found = [leaf for leaf in tree_leaves(operation.run(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            for output, new in zip(operation.outputs, found, strict=True) if operation.outputs else ():
                output.copy_(new)


class _NoWaits(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and its import takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_masked = name == "index" and any(i is not None and i.dtype is torch.bool for i in args[1])
        is_counted = name == "repeat_interleave" and "Tensor" in func._overloadname
        is_counted = is_counted and (kwargs or {}).get("output_size") is None
        is_of_host = name == "lift_fresh" and args[0].dim() > 0
        if name in _WAITS or is_masked or is_counted or is_of_host:
            raise RuntimeError(f"the host waits for the device: {func}")
        return func(*args, **(kwargs or {}))


class _Recorder(_NoWaits):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []  #: what was there before, and what was in it
        self._own: dict[int, torch.Tensor] = {}  #: by storage: what was made in this capture

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kept = self._kept((args, kwargs))
        if func._schema.is_mutable and _storage(args[0]) not in self._own:
            self.written.append((args[0], args[0].clone()))
        found = super().__torch_dispatch__(func, types, args, kwargs)
        of_inputs = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)}
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        new = {_storage(output): output for output in outputs if _storage(output) not in of_inputs}
        self._own |= new
        if func._schema.is_mutable or new:  # views are places themselves
            self.operations.append(_Operation(func, kept, [] if func._schema.is_mutable else outputs))
        return found

    @contextmanager
    def launches(self) -> Iterator[None]:
        """Record launches of Triton's kernels, which run interpreted and are no operations of torch."""
        try:
            from triton.runtime.interpreter import InterpretedFunction
        except ImportError:
            yield
            return
        run = InterpretedFunction.run

        def recorded(kernel: Any, *args: Any, **kwargs: Any) -> None:
            def again(*args: Any, **kwargs: Any) -> None:
                run(kernel, *args, **kwargs)

            self.operations.append(_Operation(again, self._kept((args, kwargs)), []))
            with _disable_current_modes():
                again(*args, **kwargs)

        InterpretedFunction.run = recorded
        try:
            yield
        finally:
            InterpretedFunction.run = run

    def _kept(self, args: Any) -> Any:
        """What a launch is given: places of what was there before, tensors of what was made in this capture."""

        def kept(leaf: Any) -> Any:
            is_place = _has_storage(leaf) and _storage(leaf) not in self._own
            return _Place.of(leaf) if is_place else leaf

        return tree_map(kept, args)


def _has_storage(leaf: Any) -> bool:
    """Whether it is a tensor that lies somewhere; weights that oneDNN packed do not."""
    return isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
