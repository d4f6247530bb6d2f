"""What this machine has: devices, which precisions they run, versions, relevant variables."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpcli import __version__
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.signals import uninterrupted

if TYPE_CHECKING:
    import torch

KNOWN_PAIR = 'pip install "torch==2.14.1" "torchvision==0.29.1"'
_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "pyarrow",
    "pydantic",
    "safetensors",
    "scikit-learn",
    "tensorboard",
    "transformers",
    "tokenizers",
    "datasets",
    "deepspeed",
    "bitsandbytes",
    "torchao",
)
# What bears on numerics, devices, threads, processes and caches. A list of names and no pattern:
# what a person's own variables hold is nobody's business.
_VARIABLES = (
    *("MPTRAIN_DATA", "MPTRAIN_CACHE", "XDG_CACHE_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING"),
    *("CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
    *("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    *(
        "TORCH_DEVICE_BACKEND_AUTOLOAD",
        "TORCHDYNAMO_DISABLE",
        "TORCH_COMPILE_DISABLE",
        "TORCH_LOGS",
    ),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_DYNAMIC"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES"),
    *("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME"),
    *("GOMP_CPU_AFFINITY", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "PYTHONPATH"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("NCCL_DEBUG", "NCCL_ALGO", "NCCL_PROTO", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"),
    *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID"),
    *("SLURM_CPUS_PER_TASK", "HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT"),
    *("HF_TOKEN", "NO_COLOR", "LANG", "LC_ALL"),
)
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS")
_SECRET_PART = re.compile(  # credentials before a URL's host, and its query
    r"(://).*(?=@)|(\?).+|((?:token|key|secret|password|signature)=)[^&\s]+", re.I
)


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine. Keys of the mappings are `cpu` and `cuda`."""

    cuda_devices: tuple[str, ...]
    emulated: Mapping[str, frozenset[str]]  # precisions that run without hardware for them: slowly
    unsupported: Mapping[str, frozenset[str]]  # precisions that do not run at all
    # half precisions in which nn.LSTM fails under autocast
    broken_lstm: Mapping[str, frozenset[str]] = field(default_factory=dict)
    cpus: int | None = None  # that this process may use; None: nobody counted them
    # bytes that are free; None or missing: nobody knows
    available_memory: Mapping[str, int | None] = field(default_factory=dict)


def check_installation() -> None:
    """Import torch and torchvision; an installation that cannot is a `UserError` (exit 3)."""
    with uninterrupted():
        try:
            import torch
        except Exception as error:
            raise _broken("torch", error) from error
        try:
            import torchvision
        except Exception as error:
            raise _broken("torchvision", error) from error
        del torch, torchvision


def _broken(package: str, error: Exception) -> UserError:
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        what, hint = f"{package} is not installed", KNOWN_PAIR
    else:
        reason = (str(error) or repr(error)).splitlines()[0]
        torch, torchvision = _version("torch"), _version("torchvision")
        what = (
            f"{package} cannot be imported: {reason} "
            f"(installed: torch {torch}, torchvision {torchvision})"
        )
        if "TORCH_DEVICE_BACKEND_AUTOLOAD" in str(error):
            hint = "set TORCH_DEVICE_BACKEND_AUTOLOAD=0, or uninstall the backend it names"
        else:
            hint = (
                "torch and torchvision must be of matching versions and the same build "
                f"(both CPU-only or both CUDA, from one package index): {KNOWN_PAIR}"
            )
    return user_error(what, hint, exit_code=Exit.ENVIRONMENT)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Of the packages that bear on what a run computes; None where one is not installed."""
    return {package: _version(package) for package in _PACKAGES}


def detect_machine(local_rank: int = 0) -> Machine:
    """Devices and the precisions that they run, without timing anything.

    Args:
        local_rank: of this process on its machine: on that GPU it tries them, and not all
            processes on the first one, where each would take memory.
    """
    check_installation()
    import torch

    if 0 < local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    emulated, unsupported, broken_lstm = {}, {}, {}
    for device in ("cpu", "cuda"):
        unsupported[device] = frozenset(p for p in _precisions(device) if _failure(device, p))
        runs = set(_precisions(device)) - unsupported[device]
        emulated[device] = frozenset(p for p in runs if not _is_native(device, p))
        broken_lstm[device] = frozenset(
            p for p in runs & {"fp16", "bf16"} if _lstm_fails(device, p)
        )
    memory = {
        "cpu": _available_memory(),
        "cuda": torch.cuda.mem_get_info()[0] if names else None,
    }
    return Machine(tuple(names), emulated, unsupported, broken_lstm, _cpu_count(), memory)


def environment() -> dict[str, Any]:
    """Versions, devices, variables, and each precision as found by running a small step in it.

    `relative_time` is the time of that step over fp32's; `native` says whether the hardware
    has instructions for the precision. Takes about a second.
    """
    check_installation()
    import torch

    cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "mptrain": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "versions": versions(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "devices": [
            {
                "device": "cpu",
                "name": _cpu_name(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "cpus": _cpu_count(),
                "threads": torch.get_num_threads(),
                "memory_bytes": _memory_bytes(),
            },
            *(
                {
                    "device": f"cuda:{index}",
                    "name": device.name,
                    "capability": f"{device.major}.{device.minor}",
                    "memory_bytes": device.total_memory,
                }
                for index, device in enumerate(cuda)
            ),
        ],
        "precisions": {
            device: _try_precisions(device) for device in ("cpu", *(["cuda"] if cuda else []))
        },
        "variables": {
            name: _redact(name, os.environ[name])
            for name in sorted(_VARIABLES)
            if name in os.environ
        },
    }


def _cpu_count() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _available_memory() -> int | None:
    """Bytes of the host's memory that this process and those it starts may still use."""
    rooms = [_cgroup_room()]
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                rooms.append(1024 * int(line.split()[1]))
    return min((room for room in rooms if room is not None), default=None)


# Controller of a control group -> its folder, its files of limit and usage, and its counter of what
# is only cached: of version 2, which names none, and of version 1.
_CGROUP_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        *("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        "total_inactive_file",
    ),
}


def _cgroup_room(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """What this process's control group and those above it leave of their limits; None: no limit.

    Files that the kernel only caches for a group it gives up when memory is needed.
    """
    try:
        rows = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    rooms = []
    for _, controllers, path in rows:
        for name in controllers.split(","):
            if name not in _CGROUP_FILES:
                continue
            folder, limit, usage, cached = _CGROUP_FILES[name]
            top = root / folder
            group = top / path.strip("/")
            for place in (group, *(above for above in group.parents if above.is_relative_to(top))):
                with suppress(OSError, ValueError):  # a file that is not there, `max`
                    free = int((place / limit).read_text()) - int((place / usage).read_text())
                    counters = (place / "memory.stat").read_text().split()
                    may_go = int(counters[counters.index(cached) + 1])
                    rooms.append(max(0, free + may_go))
    return min(rooms, default=None)


def without_secrets(text: str) -> str:
    """A text that may have come of this process's variables, without what is secret in them."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) > 3:
            text = text.replace(value, "***")
    return _redact("", text)


def _redact(name: str, value: str) -> str:
    if _SECRET_NAME.search(name):
        return "***"
    return _SECRET_PART.sub(lambda match: f"{''.join(filter(None, match.groups()))}***", value)


def _precisions(device: str) -> tuple[str, ...]:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return ()
    return ("fp32", "tf32", "bf16", "fp16")


def _is_native(device: str, precision: str) -> bool:
    """Whether the hardware computes in this precision (otherwise it is emulated in fp32)."""
    import torch

    if precision == "fp32":
        return True
    if device == "cuda":
        first = {"tf32": (8, 0), "bf16": (8, 0), "fp16": (5, 3)}[precision]
        return torch.cuda.get_device_capability() >= first
    if precision == "tf32" or not torch.backends.mkldnn.is_available():
        return False
    if precision == "fp16":
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if platform.machine() in ("x86_64", "AMD64"):  # oneDNN's own answer means AVX-512 alone here
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _try_precisions(device: str) -> dict[str, dict[str, Any]]:
    import torch

    failures = {precision: _failure(device, precision) for precision in _precisions(device)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for a busy CPU would be what is measured
    try:
        seconds = {
            precision: _seconds(device, precision)
            for precision, failure in failures.items()
            if failure is None
        }
    finally:
        torch.set_num_threads(threads)
    return {
        precision: {
            "runs": failure is None,
            "native": failure is None and _is_native(device, precision),
            "relative_time": seconds[precision] / seconds["fp32"] if failure is None else None,
            "error": failure,
        }
        for precision, failure in failures.items()
    }


def _failure(device: str, precision: str) -> str | None:
    """Why forward and backward of a tiny layer fail in this precision; None if they run."""
    if precision == "tf32" and not _is_native(device, precision):  # it would run: in fp32
        return "TF32 needs an NVIDIA GPU of compute capability 8.0 or more"
    try:
        _small_step(device, precision, size=8)
    except RuntimeError as error:
        return (str(error) or repr(error)).splitlines()[0]
    return None


def _autocast(device: str, precision: str) -> AbstractContextManager[object]:
    import torch

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.amp.autocast(device, dtype=half) if half else nullcontext()


def _lstm_fails(device: str, precision: str) -> bool:
    """Whether nn.LSTM fails under torch's own autocast, as it does in oneDNN on some CPUs."""
    import torch

    lstm = torch.nn.LSTM(8, 8, device="meta").to_empty(device=device)  # draws no random numbers
    try:
        with _autocast(device, precision):
            outputs, _ = lstm(torch.ones(2, 1, 8, device=device))
        outputs.float().sum().backward()
    except RuntimeError:
        return True
    return False


def _seconds(device: str, precision: str, repeats: int = 3) -> float:
    import torch

    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        _small_step(device, precision, size=128)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _small_step(device: str, precision: str, size: int) -> torch.Tensor:
    """Forward and backward of a convolution and a matrix product of about `size`."""
    import torch

    matmul_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        images = torch.ones(8, 16, 12, 12, device=device)
        kernel = torch.ones(16, 16, 3, 3, device=device, requires_grad=True)
        weight = torch.ones(size, size, device=device, requires_grad=True)
        with _autocast(device, precision):
            convolved = torch.nn.functional.conv2d(images, kernel)
            product = torch.ones(size, size, device=device) @ weight
        (convolved.float().sum() + product.float().sum()).backward()
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
    assert weight.grad is not None
    return weight.grad
