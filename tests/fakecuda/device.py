"""Tensors of a CPU-only torch that claim to be on "cuda:0": real numbers, pretended devices.

Every storage has a claim, kept by two modes. :class:`Names` turns a device that Python code names
into a claim, and answers ``.device``, ``.is_cuda`` and ``.numpy()``. :class:`Checks` sees every
ATen call, those of backward passes included: outputs inherit the claims of the inputs, and where
tensors of both devices meet it raises as CUDA would. torch.cuda says that there is one GPU.
Autocast on "cuda" is the CPU's, with the same dtype; a GradScaler works as it is.

What is not seen: the arithmetic and the launch limits of kernels, streams, memory, what C++
extensions check, operations that CUDA lacks or does in another dtype, autocast's list for CUDA,
and several GPUs.
"""

import collections
import contextlib
import traceback
from types import SimpleNamespace

import torch
import torch.utils.checkpoint
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# of storages that claim to be on CUDA, by the address of their implementation; the reference keeps
# the address from being given to another storage
CLAIMS: dict[int, StorageWeakRef] = {}
FIRST_SWEEP = 20_000  # claims after which those of storages that are gone are dropped
OURS = ("/threestudio/", "/lods/", "/gsplat/strategy")

waits: collections.Counter = collections.Counter()  # while counting: line -> times
_state = SimpleNamespace(counting=False, quiet=False, sweep_at=FIRST_SWEEP)


class DeviceMixError(RuntimeError):
    """Tensors of both devices met in one operation."""


# --- claims ---------------------------------------------------------------------------------------


def _key(tensor) -> int:
    return tensor.untyped_storage()._cdata


def _has_storage(value) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def on_cuda(tensor) -> bool:
    """Whether a tensor claims to be on the pretended device."""
    return _has_storage(tensor) and _key(tensor) in CLAIMS


def claim(tensor, cuda: bool):
    """Give a tensor's storage this claim; returns the tensor."""
    if not _has_storage(tensor):
        return tensor
    if not cuda:
        CLAIMS.pop(_key(tensor), None)
    elif _key(tensor) not in CLAIMS:
        CLAIMS[_key(tensor)] = StorageWeakRef(tensor.untyped_storage())
        if len(CLAIMS) > _state.sweep_at:
            for key in [key for key, reference in CLAIMS.items() if reference.expired()]:
                del CLAIMS[key]
            _state.sweep_at = 2 * len(CLAIMS) + FIRST_SWEEP
    return tensor


def _claim_all(values, cuda: bool):
    for value in tree_flatten(values)[0]:
        claim(value, cuda)
    return values


def _names_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _line() -> str:
    """The line of this project, or of another package, that the current operation is from."""
    frames = traceback.extract_stack()[:-2]
    for chosen in (
        lambda name: any(part in name for part in OURS) and "fakecuda" not in name,
        lambda name: "site-packages" in name and "/torch/" not in name,
    ):
        for frame in reversed(frames):
            if chosen(frame.filename):
                where = "/".join(frame.filename.split("/")[-2:])
                return f"{where}:{frame.lineno} {frame.line}"
    return "torch"


def _wait(kind: str) -> None:
    """The CPU would wait for the GPU here; but not where a stand-in for kernels reads from it."""
    if _state.counting and not any("fakecuda/kernels" in f for f, *_ in traceback.extract_stack()):
        waits[f"{kind} | {_line()}"] += 1


@contextlib.contextmanager
def counting():
    """Within this, what would make the CPU wait for the GPU is counted in ``waits``."""
    waits.clear()
    _state.counting = True
    try:
        yield waits
    finally:
        _state.counting = False


# --- operations -----------------------------------------------------------------------------------

BOTH_DEVICES = ("aten::copy_", "aten::_to_copy", "aten::set_", "aten::record_stream")
BOTH_DEVICES += ("aten::resolve",)
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
INDEXING |= {"aten::_unsafe_index"}
JOINING = ("aten::cat", "aten::stack", "aten::mm", "aten::bmm", "aten::addmm")
OPTIMIZING = ("aten::_fused_adam", "aten::_foreach_", "aten::_amp_")
WAITING = {  # whose results, or their shapes, the CPU has to know
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_local_scalar_dense": "item",
    "aten::equal": "equal",
    "aten::is_nonzero": "bool",
    "aten::_unique2": "unique",
    "aten::repeat_interleave": "repeat_interleave",
}


class Checks(TorchDispatchMode):
    """Passes claims on, and refuses operations on tensors of both devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        claims = [on_cuda(tensor) for tensor in tensors]
        cuda = any(claims)
        if cuda and name in WAITING and claims[0]:
            _wait(WAITING[name])
        if cuda and name in INDEXING:
            self._index(name, args, tensors, claims)
        elif cuda and not all(claims) and not name.startswith(BOTH_DEVICES):
            # a number without dimensions may be on the CPU, unless tensors are joined
            others = [
                tensor
                for tensor, there in zip(tensors, claims)
                if not there and (tensor.dim() > 0 or name.startswith(JOINING))
            ]
            counters = name.startswith(OPTIMIZING) and all(o.dim() == 0 for o in others)
            if others and not counters:
                self._refuse(name, tensors, claims)
        inputs = {_key(tensor) for tensor in tensors if _has_storage(tensor)}
        out = func(*args, **kwargs)
        for result in tree_flatten(out)[0]:  # a view has its storage's claim already
            if _has_storage(result) and _key(result) not in inputs:
                claim(result, cuda)
        return out

    def _index(self, name, args, tensors, claims) -> None:
        indices = [i for i in args[1] if isinstance(i, torch.Tensor)]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            _wait("boolean mask")
        values = args[2] if len(args) > 2 and isinstance(args[2], torch.Tensor) else None
        far = values is not None and values.dim() > 0 and not on_cuda(values)
        if not claims[0] or far:
            self._refuse(name, tensors, claims)
        if not all(on_cuda(i) for i in indices):
            _wait("index on the CPU")

    def _refuse(self, name, tensors, claims) -> None:
        if not _state.quiet:
            shapes = ", ".join(
                f"{'cuda' if there else 'cpu'}{tuple(tensor.shape)}"
                for tensor, there in zip(tensors, claims)
            )
            raise DeviceMixError(
                f"Expected all tensors to be on the same device: {name}: {shapes} ({_line()})"
            )


class Move(torch.autograd.Function):
    """A copy on the other device, whose gradient comes back to this one."""

    @staticmethod
    def forward(ctx, x, cuda):
        ctx.from_cuda = on_cuda(x)
        return claim(x.clone(), cuda)

    @staticmethod
    def backward(ctx, grad):
        return claim(grad.clone(), ctx.from_cuda), None


# --- names of devices -----------------------------------------------------------------------------

PLAIN = {"untyped_storage", "is_sparse", "_typed_storage", "layout", "stride", "size", "dim"}
MADE_LIKE = {"new_tensor", "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"}
FROM_DATA = {"from_numpy", "tensor", "as_tensor", "frombuffer", "asarray"}
IN_PYTHON = {"unravel_index"}  # written in Python, where they ask for devices without this mode


class Names(TorchFunctionMode):
    """Takes "cuda" for the CPU and a claim, in functions of torch and methods of tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        own = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "__get__":
            answers = {"device": CUDA, "is_cuda": True, "is_cpu": False}
            asked = getattr(getattr(func, "__self__", None), "__name__", "")
            if asked in answers and on_cuda(args[0]):
                return answers[asked]
        elif name in PLAIN or (own is not None and name == "__reduce_ex__"):
            pass
        elif own is not None and name in ("numpy", "__array__") and on_cuda(own):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({_line()})")
        elif own is not None and name == "tolist" and on_cuda(own):
            _wait("tolist")
        elif own is not None and name in ("cpu", "cuda"):
            return self._move(own, name == "cuda", name)
        elif own is not None and name == "get_device":
            return 0 if on_cuda(own) else -1
        elif name == "pin_memory":
            return own
        elif own is not None and name == "to":
            return self._to(func, own, args[1:], kwargs)
        elif kwargs.get("device") is not None:
            return self._made(func, args, kwargs)
        elif name in IN_PYTHON:
            _state.quiet = True
            try:
                return _claim_all(func(*args, **kwargs), on_cuda(own))
            finally:
                _state.quiet = False
        elif name in MADE_LIKE:
            return claim(func(*args, **kwargs), on_cuda(own))
        elif name in FROM_DATA and not (name in ("as_tensor", "asarray") and own is not None):
            return claim(func(*args, **kwargs), False)
        return func(*args, **kwargs)

    @staticmethod
    def _move(tensor, cuda: bool, how: str):
        if on_cuda(tensor) == cuda:
            return tensor
        if not cuda:
            _wait(how)
        return Move.apply(tensor, cuda)

    def _to(self, func, tensor, args, kwargs):
        """``tensor.to(device)``, ``.to(dtype)`` or ``.to(other)``."""
        cuda, args = None, list(args)
        like = kwargs.get("other", args[0] if args else None)
        if kwargs.get("device") is not None:
            cuda, kwargs["device"] = _names_cuda(kwargs["device"]), CPU
        elif isinstance(like, torch.Tensor):
            cuda = on_cuda(like)
            kwargs.pop("other", None)
            args = [CPU, like.dtype, *args[1:]]
        elif args and isinstance(args[0], (torch.device, str)):
            cuda, args[0] = _names_cuda(args[0]), CPU
        had = on_cuda(tensor)
        out = func(tensor, *args, **kwargs)
        if cuda is not None and cuda != had:
            return self._move(claim(out, had), cuda, "to(cpu)")
        return out if out is tensor else claim(out, had)

    @staticmethod
    def _made(func, args, kwargs):
        """A function with ``device=``."""
        cuda = _names_cuda(kwargs["device"])
        if cuda:
            kwargs["device"] = CPU
            if kwargs.get("generator") is not None:
                raise RuntimeError(
                    f"Expected a 'cuda' device type for generator but found 'cpu' ({_line()})"
                )
        out = func(*args, **kwargs)
        return _claim_all(out, cuda) if cuda or isinstance(out, torch.Tensor) else out


# --- torch.cuda -----------------------------------------------------------------------------------


def _replacements() -> dict:
    """(owner, name) -> what stands there while the device is pretended."""
    properties = SimpleNamespace(
        total_memory=80 << 30,
        name="Pretended GPU",
        major=9,
        minor=0,
        multi_processor_count=132,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        L2_cache_size=50 << 20,
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_initialized": True,
        "is_bf16_supported": True,
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "get_device_capability": (9, 0),
        "max_memory_allocated": 0,
        "memory_stats": {},
    }
    silent = ("set_device", "_lazy_init", "init", "empty_cache", "synchronize", "ipc_collect")
    silent += ("set_rng_state", "set_rng_state_all", "manual_seed", "manual_seed_all")
    answers |= dict.fromkeys((*silent, "reset_peak_memory_stats"))
    made = {(torch.cuda, name): _answering(value) for name, value in answers.items()}
    made[torch.cuda, "get_rng_state"] = lambda device=0: torch.zeros(16, dtype=torch.uint8)
    made[torch.cuda, "get_rng_state_all"] = lambda: [torch.zeros(16, dtype=torch.uint8)]

    autocast = torch.amp.autocast_mode.autocast
    start, enabled, dtype_of = (
        autocast.__init__,
        torch.is_autocast_enabled,
        torch.get_autocast_dtype,
    )

    def on_cpu(device):
        return "cpu" if str(device).startswith("cuda") else device

    def begin(self, device_type, dtype=None, *args, **kwargs):
        if dtype is None and on_cpu(device_type) != device_type:
            dtype = torch.float16
        return start(self, on_cpu(device_type), dtype, *args, **kwargs)

    made[autocast, "__init__"] = begin
    made[torch, "is_autocast_enabled"] = lambda device="cpu": enabled(on_cpu(device))
    made[torch, "get_autocast_dtype"] = lambda device: dtype_of(on_cpu(device))

    run_backward = torch.autograd._engine_run_backward

    def run_within(*args, **kwargs):  # Tensor.backward is run with the function mode popped
        if isinstance(torch.overrides._get_current_function_mode(), Names):
            return run_backward(*args, **kwargs)
        with Names():
            return run_backward(*args, **kwargs)

    made[torch.autograd, "_engine_run_backward"] = run_within
    return made


def _answering(value):
    return lambda *args, **kwargs: value


@contextlib.contextmanager
def pretended_gpu():
    """Within this, torch has one CUDA device, "cuda:0"."""
    CLAIMS.clear()
    replacements = _replacements()
    originals = {place: getattr(*place) for place in replacements}
    # the recomputation compares devices, where the function mode may be popped
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    default = torch.utils.checkpoint._DEFAULT_DETERMINISM_MODE
    check = checks[default]
    checks[default] = lambda x: {"shape": x.shape, "dtype": x.dtype}
    for place, value in replacements.items():
        setattr(*place, value)
    try:
        with Names(), Checks():
            yield
    finally:
        checks[default] = check
        for place, value in originals.items():
            setattr(*place, value)
        CLAIMS.clear()
