"""The compiled CPU kernels: integers in, memory written. Call them through `cortexloop._native`, which checks pointers.

Common arguments: images (address; dtype 0 = uint8 RGB 0..255, 1 = float32 recentred; layout 0 = NHWC, 1 = NCHW; batch,
height, width), packed weights (address of float32, length), table (address of int64, models, columns) and pairs
(address of int64 [batch], 0 = every image with every model). Codes of evolutions are float32 [n_problems, rows,
columns], problems int64 [n_problems]; csrc/include/cortexloop/evolution.h has the definitions. Everything that computes
releases the GIL; errors are ValueError, or MemoryError.
"""

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def fast_supported() -> bool: ...
def bank_unsupported(table: int, models: int, columns: int) -> str: ...
def bank_forward(
    images: int,
    dtype: int,
    layout: int,
    batch: int,
    height: int,
    width: int,
    weights: int,
    weights_length: int,
    table: int,
    models: int,
    columns: int,
    pairs: int,
    precision: int,
    out: int,
) -> None: ...
def bank_input_gradient(
    images: int,
    dtype: int,
    layout: int,
    batch: int,
    height: int,
    width: int,
    weights: int,
    weights_length: int,
    table: int,
    models: int,
    columns: int,
    pairs: int,
    cotangent: int,
    grad: int,
    responses: int,
) -> None: ...
def bank_pullback(
    images: int,
    dtype: int,
    layout: int,
    batch: int,
    height: int,
    width: int,
    weights: int,
    weights_length: int,
    table: int,
    models: int,
    columns: int,
    cotangents: int,
    count: int,
    grads: int,
) -> None: ...
def random_rows(
    normal: bool,
    seed: int,
    stream: int,
    step: int,
    problems: int,
    n_problems: int,
    rows: int,
    columns: int,
    out: int,
) -> None: ...
def sample_codes(
    seed: int,
    stream: int,
    step: int,
    problems: int,
    n_problems: int,
    rows: int,
    columns: int,
    mean: int,
    scale: int,
    diagonal: int,
    left: int,
    right: int,
    rank: int,
    out: int,
) -> None: ...
def code_moments(
    codes: int,
    weights: int,
    centre: int,
    n_problems: int,
    rows: int,
    columns: int,
    first: int,
    second: int,
) -> None: ...
def low_rank_product(x: int, left: int, right: int, rank: int, n_problems: int, columns: int, out: int) -> None: ...
def row_dots(x: int, y: int, n_problems: int, columns: int, out: int) -> None: ...
def feature_moments(
    features: int,
    dtype: int,
    weights: int,
    centred: int,
    shift: int,
    before: float,
    batch: float,
    images: int,
    columns: int,
    neurons: int,
    mean: int,
    m2: int,
    cross: int,
) -> None: ...
def factorized_readout(
    features: int,
    batch: int,
    masks: int,
    vectors: int,
    neurons: int,
    rank: int,
    channels: int,
    positions: int,
    responses: int,
) -> None: ...
def factorized_readout_gradient(
    features: int,
    batch: int,
    masks: int,
    vectors: int,
    neurons: int,
    rank: int,
    channels: int,
    positions: int,
    cotangent: int,
    d_features: int,
    d_masks: int,
    d_vectors: int,
) -> None: ...
def point_readout(
    features: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    positions: int,
    shared: bool,
    vectors: int,
    neurons: int,
    align_corners: bool,
    responses: int,
) -> None: ...
def point_readout_gradient(
    features: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    positions: int,
    shared: bool,
    vectors: int,
    neurons: int,
    align_corners: bool,
    cotangent: int,
    d_features: int,
    d_positions: int,
    d_vectors: int,
) -> None: ...
def nmf(
    matrices: int,
    problems: int,
    rows: int,
    columns: int,
    rank: int,
    is_signed: bool,
    l1_w: float,
    l2_w: float,
    l1_h: float,
    l2_h: float,
    tolerance: float,
    max_iterations: int,
    w: int,
    h: int,
    iterations: int,
) -> None: ...

class BankPlan:
    def __init__(
        self,
        images: int,
        dtype: int,
        layout: int,
        batch: int,
        height: int,
        width: int,
        weights: int,
        weights_length: int,
        table: int,
        models: int,
        columns: int,
        pairs: int,
        precision: int,
        out: int,
    ) -> None: ...
    def run(self) -> None: ...

def lasso_path(
    gram: int,
    columns: int,
    mask: int,
    means: int,
    diagonal: int,
    n_sets: int,
    features: int,
    images: int,
    set_of: int,
    responses: int,
    cross: int,
    squares: int,
    penalties: int,
    n_problems: int,
    n_penalties: int,
    tolerance: float,
    max_sweeps: int,
    weights: int,
    gaps: int,
    sweeps: int,
) -> None: ...
