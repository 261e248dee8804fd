"""The compiled CUDA kernels: device addresses in, device memory written. Call them through `cortexloop._native.gpu`.

Common arguments: image_ptr (device address of `Bank.device_image()`, aligned to 256 bytes), images (device address;
dtype 0 = uint8 RGB 0..255, 1 = float32 recentred; layout 0 = NHWC, 1 = NCHW; batch, height, width), pairs_ptr (device
address of int64 [batch], 0 = every image with every model), workspace (device address and bytes), device (its number)
and stream (CUDA's handle, 0 = the default stream). Launches allocate nothing and do not wait. Errors are ValueError
(arguments), MemoryError (out of memory) and RuntimeError (a launch: the kernel's name and CUDA's message).
"""

from typing import TypedDict

class Device(TypedDict):
    name: str
    major: int
    minor: int
    multiprocessors: int
    shared_memory: int
    memory: int
    l2: int

def emulated() -> bool: ...
def unavailable() -> str: ...
def device_count() -> int: ...
def device(index: int) -> Device: ...
def device_unsupported(index: int) -> str: ...
def bank_unsupported(table_ptr: int, n_models: int, table_stride: int) -> str: ...
def bank_note(table_ptr: int, n_models: int, table_stride: int) -> str: ...
def feature_moments(
    features_ptr: int,
    dtype: int,
    weights_ptr: int,
    centred_ptr: int,
    shift_ptr: int,
    before: float,
    batch: float,
    images: int,
    columns: int,
    neurons: int,
    mean_ptr: int,
    m2_ptr: int,
    cross_ptr: int,
    device: int,
    stream: int,
) -> None:
    """dtype: 0 = float32, 1 = float16, 2 = bfloat16; weights_ptr 0 = ones."""

class Bank:
    def __init__(
        self, weights_ptr: int, weights_len: int, table_ptr: int, n_models: int, table_stride: int
    ) -> None: ...
    def device_image(self) -> bytes: ...
    def forward_workspace(self, device: int, dtype: int, batch: int, paired: bool, precision: int) -> int: ...
    def forward(
        self,
        image_ptr: int,
        images_ptr: int,
        dtype: int,
        layout: int,
        batch: int,
        height: int,
        width: int,
        pairs_ptr: int,
        precision: int,
        out_ptr: int,
        workspace_ptr: int,
        workspace_bytes: int,
        device: int,
        stream: int,
    ) -> None: ...
    def gradient_workspace(self, device: int, dtype: int, batch: int, paired: bool) -> int: ...
    def gradient(
        self,
        image_ptr: int,
        images_ptr: int,
        dtype: int,
        layout: int,
        batch: int,
        height: int,
        width: int,
        pairs_ptr: int,
        cotangent_ptr: int,
        grad_ptr: int,
        responses_ptr: int,
        workspace_ptr: int,
        workspace_bytes: int,
        device: int,
        stream: int,
    ) -> None: ...
