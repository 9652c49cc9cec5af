"""The operations that a graph may name. What is not here does not run, whatever torch can do.

The list is curated: arithmetic on tensors and nothing else. No file, network, process, pickle, callback, data pointer,
storage, or global state (seed, threads, default device or dtype) is reachable by name, by attribute or by a string.
Names are ``torch.X``, ``torch.nn.functional.X``, ``torch.linalg.X``, ``torch.fft.X``, ``torch.special.X``, ``Tensor.X``,
``operator.X``, ``attribute``, ``einops.X`` and those of the protocol itself (``model.output``, ``save``, …). Why the rest is
left out stands in `denied`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph import build
from nnsight_hpc.graph.denied import DENIED, FORBIDDEN, reason_against
from nnsight_hpc.graph.nodes import Seed

if TYPE_CHECKING:
    from collections.abc import Mapping


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions of torch that are methods of a tensor with the same meaning, too.
_ELEMENTWISE = _names("""
    abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan
    atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil clamp clamp_max
    clamp_min clip clone conj conj_physical copysign cos cosh deg2rad digamma div divide eq erf erfc erfinv exp exp2 expm1 fix
    float_power floor floor_divide fmax fmin fmod frac frexp gcd ge greater greater_equal gt hardshrink heaviside hypot i0
    igamma igammac isclose isfinite isinf isnan isneginf isposinf isreal lcm ldexp le lerp less less_equal lgamma log log10
    log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mul
    multiply nan_to_num ne neg negative nextafter not_equal positive pow prelu rad2deg reciprocal relu remainder
    resolve_conj resolve_neg round rsqrt sgn sigmoid sign signbit sin sinc sinh sqrt square sub subtract tan tanh true_divide
    trunc where xlogy
""")
_REDUCTIONS = _names("""
    all allclose amax amin aminmax any argmax argmin bincount corrcoef count_nonzero cov cummax cummin cumprod cumsum diff
    dist equal histc histogram kthvalue log_softmax logcumsumexp logsumexp max mean median min mode nanmean nanmedian
    nanquantile nansum norm prod quantile renorm softmax std sum trace var
""")
_INDEXING = _names("""
    adjoint argsort argwhere broadcast_to chunk diag diag_embed diagflat diagonal diagonal_scatter dsplit flatten flip fliplr
    flipud gather hsplit index_add index_copy index_fill index_put index_reduce index_select masked_scatter masked_select
    moveaxis movedim msort narrow nonzero nonzero_static permute put ravel repeat_interleave reshape roll rot90 scatter
    scatter_add scatter_reduce select select_scatter slice_scatter sort split split_with_sizes squeeze swapaxes swapdims t take
    take_along_dim tensor_split tile topk transpose tril triu unbind unflatten unique unique_consecutive unsqueeze vsplit
""")
_ALGEBRA = _names("""
    addbmm addmm addmv addr baddbmm bmm cholesky cholesky_inverse cholesky_solve cross det dot geqrf ger inner inverse istft
    kron logdet matmul matrix_exp matrix_power mm mv orgqr ormqr outer pinverse qr slogdet stft svd vdot
""")
_QUESTIONS = _names("detach is_complex is_conj is_floating_point is_neg is_nonzero is_same_size is_signed numel")
_SEEDED = _names("bernoulli multinomial")
_BOTH = _ELEMENTWISE | _REDUCTIONS | _INDEXING | _ALGEBRA | _QUESTIONS | _SEEDED

_SEEDED_FUNCTIONS = _SEEDED | _names("""
    normal poisson rand rand_like randint randint_like randn randn_like randperm
""")
_TORCH_ONLY = _SEEDED_FUNCTIONS | _names("""
    arange as_tensor atleast_1d atleast_2d atleast_3d bartlett_window bilinear blackman_window block_diag broadcast_shapes
    broadcast_tensors bucketize can_cast cartesian_prod cat cdist celu chain_matmul channel_shuffle column_stack complex concat
    concatenate constant_pad_nd conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d
    cosine_similarity cumulative_trapezoid dstack einsum eye fill full full_like gradient hamming_window hann_window histogramdd
    hstack imag isin kaiser_window layer_norm linspace logspace meshgrid ones ones_like pairwise_distance pdist pixel_shuffle
    pixel_unshuffle polar promote_types real result_type rms_norm row_stack rsub scalar_tensor searchsorted selu stack std_mean
    tensor tensordot trapezoid trapz tril_indices triu_indices unravel_index vander var_mean view_as_complex view_as_real
    vstack zeros zeros_like
""")

_METHODS_ONLY = _names("""
    bfloat16 bool byte cdouble cfloat char contiguous cpu cuda dim dim_order double element_size expand expand_as float half
    int is_contiguous item long ndimension nelement new_full new_ones new_tensor new_zeros repeat reshape_as short size stride
    sum_to_size to tolist type type_as unfold view view_as
""")

# In place: they write the elements of their tensor and nothing else. On values only: the schedule refuses parameters.
_SEEDED_IN_PLACE = _names("bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_")
_IN_PLACE_METHODS = _SEEDED_IN_PLACE | _names("""
    abs_ absolute_ acos_ acosh_ add_ addbmm_ addcdiv_ addcmul_ addmm_ addmv_ addr_ arccos_ arccosh_ arcsin_ arcsinh_ arctan2_
    arctan_ arctanh_ asin_ asinh_ atan2_ atan_ atanh_ baddbmm_ bitwise_and_ bitwise_left_shift_ bitwise_not_ bitwise_or_
    bitwise_right_shift_ bitwise_xor_ ceil_ clamp_ clamp_max_ clamp_min_ clip_ conj_physical_ copy_ copysign_ cos_ cosh_
    cumprod_ cumsum_ deg2rad_ digamma_ div_ divide_ eq_ erf_ erfc_ erfinv_ exp2_ exp_ expm1_ fill_ fill_diagonal_ fix_
    float_power_ floor_ floor_divide_ fmod_ frac_ gcd_ ge_ greater_ greater_equal_ gt_ heaviside_ hypot_ i0_ igamma_ igammac_
    index_add_ index_copy_ index_fill_ index_put_ index_reduce_ lcm_ ldexp_ le_ lerp_ less_ less_equal_ lgamma_ log10_ log1p_
    log2_ log_ logical_and_ logical_not_ logical_or_ logical_xor_ logit_ lt_ masked_fill_ masked_scatter_ mul_ multiply_
    nan_to_num_ ne_ neg_ negative_ nextafter_ not_equal_ pow_ put_ rad2deg_ reciprocal_ relu_ remainder_ renorm_
    requires_grad_ round_ rsqrt_ scatter_ scatter_add_ scatter_reduce_ sgn_ sigmoid_ sign_ sin_ sinc_ sinh_ sqrt_ square_ sub_
    subtract_ tan_ tanh_ tril_ triu_ true_divide_ trunc_ xlogy_ zero_
""")

_FUNCTIONAL = _names("""
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    affine_grid avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear binary_cross_entropy binary_cross_entropy_with_logits celu
    channel_shuffle conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d cosine_embedding_loss
    cosine_similarity cross_entropy elu embedding fold gaussian_nll_loss gelu glu grid_sample group_norm hardshrink hardsigmoid
    hardswish hardtanh hinge_embedding_loss huber_loss interpolate kl_div l1_loss layer_norm leaky_relu linear
    local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d lp_pool3d margin_ranking_loss max_pool1d max_pool2d
    max_pool3d mish mse_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss nll_loss normalize one_hot pad
    pairwise_distance pdist pixel_shuffle pixel_unshuffle poisson_nll_loss prelu relu relu6 rms_norm
    scaled_dot_product_attention selu sigmoid silu smooth_l1_loss soft_margin_loss softmax softmin softplus softshrink softsign
    tanh tanhshrink threshold triplet_margin_loss unfold
""")

_LINALG = _names("""
    cholesky cholesky_ex cond cross det diagonal eig eigh eigvals eigvalsh householder_product inv inv_ex ldl_factor
    ldl_factor_ex lstsq lu lu_factor lu_factor_ex matmul matrix_exp matrix_norm matrix_power matrix_rank multi_dot norm pinv qr
    slogdet solve solve_ex solve_triangular svd svdvals tensorinv tensorsolve vander vecdot vector_norm
""")

_FFT = _names("""
    fft fft2 fftfreq fftn fftshift hfft hfft2 hfftn ifft ifft2 ifftn ifftshift ihfft ihfft2 ihfftn irfft irfft2 irfftn rfft
    rfft2 rfftfreq rfftn
""")

_SPECIAL = _names("""
    airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammainc gammaincc
    gammaln i0 i0e i1 i1e log1p log_ndtr log_softmax logit logsumexp modified_bessel_i0 modified_bessel_i1 modified_bessel_k0
    modified_bessel_k1 ndtr ndtri psi round scaled_modified_bessel_k0 scaled_modified_bessel_k1 sinc softmax
    spherical_bessel_j0 xlog1py xlogy zeta
""")

_IN_PLACE_OPERATORS = _names("iadd iand ifloordiv ilshift imod imul ior ipow irshift isub itruediv ixor setitem")
_OPERATORS = _IN_PLACE_OPERATORS | _names("""
    abs add and_ contains eq floordiv ge getitem gt invert le lshift lt matmul mod mul ne neg not_ or_ pos pow rshift sub
    truediv xor
""")

_EINOPS = _names("einsum pack parse_shape rearrange reduce repeat unpack")

FACTS = _names("shape dtype device ndim itemsize nbytes is_cpu is_cuda is_leaf requires_grad")
"""Attributes of a tensor that are no views of it."""

ATTRIBUTES = FACTS | _names("T mT H mH real imag")
"""Attributes of a tensor. Of a model's output, its fields may be asked for; of anything else, nothing."""

DENIED_KEYWORDS = _names("out inplace pin_memory layout names training max_norm dropout_p check_invariants _stacklevel")
"""Keywords that write elsewhere than into the result, draw random numbers, or carry what a graph cannot hold."""

MOST_POSITIONAL = {
    "torch.norm": 4,
    "torch.tensordot": 3,
    "torch.nn.functional.batch_norm": 5,
    "torch.nn.functional.celu": 2,
    "torch.nn.functional.elu": 2,
    "torch.nn.functional.embedding": 3,
    "torch.nn.functional.hardsigmoid": 1,
    "torch.nn.functional.hardswish": 1,
    "torch.nn.functional.hardtanh": 3,
    "torch.nn.functional.leaky_relu": 2,
    "torch.nn.functional.log_softmax": 2,
    "torch.nn.functional.mish": 1,
    "torch.nn.functional.normalize": 4,
    "torch.nn.functional.relu": 1,
    "torch.nn.functional.scaled_dot_product_attention": 4,
    "torch.nn.functional.relu6": 1,
    "torch.nn.functional.selu": 1,
    "torch.nn.functional.silu": 1,
    "torch.nn.functional.softmax": 2,
    "torch.nn.functional.softmin": 2,
    "torch.nn.functional.threshold": 3,
}
"""How many positional arguments stand before the first denied keyword, for functions that take it by position, too."""

DTYPES = _names("""
    bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128 half float
    double short int long cfloat cdouble float8_e4m3fn float8_e5m2
""")

LOCAL_ONLY = frozenset({build.APPLY})
"""Operations that run in the researcher's own process, and are refused in a graph that comes from anywhere else."""

PROTOCOL = LOCAL_ONLY | {
    *build.FORWARDS,
    *build.READS.values(),
    *build.SETS.values(),
    *(build.INVOKE, build.SKIP, build.RESULT, build.PARAMETER, build.CALL, build.SAVE, build.LOG),
    *(build.BACKWARD, build.READ_GRAD, build.SET_GRAD),
    *(build.IF, build.ELSE, build.MERGE, build.LOOP, build.ITEM, build.CARRIED, build.NEXT, build.END, build.FINAL),
    *(build.COLLECT, build.RANGE, build.LEAVE, build.CHECK, build.REACHED),
    *(build.LIST, build.DICT, build.APPEND, build.LENGTH),
    "attribute",
}

ALLOWED: frozenset[str] = PROTOCOL - LOCAL_ONLY | {
    f"{prefix}.{name}"
    for prefix, names in (
        ("torch", _BOTH | _TORCH_ONLY),
        ("Tensor", _BOTH | _METHODS_ONLY | _IN_PLACE_METHODS),
        ("torch.nn.functional", _FUNCTIONAL),
        ("torch.linalg", _LINALG),
        ("torch.fft", _FFT),
        ("torch.special", _SPECIAL),
        ("operator", _OPERATORS),
        ("einops", _EINOPS),
    )
    for name in names
}

FIELDS_OF: dict[str, frozenset[str]] = {
    op: _names(fields)
    for ops, fields in (
        ("topk sort max min median nanmedian mode kthvalue cummax cummin", "values indices"),
        ("aminmax", "min max"),
        ("frexp", "mantissa exponent"),
        ("geqrf", "a tau"),
        ("histogram", "hist bin_edges"),
        ("slogdet linalg.slogdet", "sign logabsdet"),
        ("qr linalg.qr", "Q R"),
        ("svd", "U S V"),
        ("linalg.svd", "U S Vh"),
        ("linalg.eig linalg.eigh", "eigenvalues eigenvectors"),
        ("linalg.lu", "P L U"),
        ("linalg.lu_factor", "LU pivots"),
        ("linalg.lu_factor_ex", "LU pivots info"),
        ("linalg.ldl_factor", "LD pivots"),
        ("linalg.ldl_factor_ex", "LD pivots info"),
        ("linalg.cholesky_ex", "L info"),
        ("linalg.inv_ex", "inverse info"),
        ("linalg.solve_ex", "result info"),
        ("linalg.lstsq", "solution residuals rank singular_values"),
        ("histogramdd", "hist bin_edges"),
    )
    for name in ops.split()
    for op in (f"torch.{name}", f"Tensor.{name}")
    if op in ALLOWED
}
"""The fields of the named tuples that these operations return (``x.topk(5).indices``)."""

FIELDS = frozenset().union(*FIELDS_OF.values())

IN_PLACE: frozenset[str] = (
    frozenset(f"Tensor.{name}" for name in _IN_PLACE_METHODS)
    | {f"operator.{name}" for name in _IN_PLACE_OPERATORS}
    | {build.APPEND}
)
"""Operations that change the value of their first argument."""

RANDOM: frozenset[str] = frozenset(f"torch.{name}" for name in _SEEDED_FUNCTIONS) | {
    f"Tensor.{name}" for name in _SEEDED | _SEEDED_IN_PLACE
}
"""Operations that draw random numbers: from a seed of their own, the keyword ``generator``, never from the process's."""

_VIEWS = _names("""
    adjoint as_tensor atleast_1d atleast_2d atleast_3d bfloat16 bool broadcast_tensors broadcast_to byte cdouble cfloat char
    chunk conj conj_physical contiguous cpu cuda detach diagonal double dsplit expand expand_as flatten float half hsplit imag
    int long moveaxis movedim narrow permute positive ravel real reshape reshape_as resolve_conj resolve_neg select short split
    split_with_sizes squeeze sum_to_size swapaxes swapdims t tensor_split to transpose type type_as unbind unflatten unfold
    unsqueeze view view_as view_as_complex view_as_real vsplit
""")
VIEWS: frozenset[str] = ALLOWED & {f"{prefix}.{name}" for prefix in ("torch", "Tensor") for name in _VIEWS} | {
    "operator.getitem",
    "operator.pos",
    "attribute",
    *(f"einops.{name}" for name in _EINOPS),
    "torch.cartesian_prod",
    "torch.histogramdd",
    "torch.chain_matmul",
    "torch.einsum",
    "torch.linalg.diagonal",
    "torch.meshgrid",
}
"""Operations whose result may share memory with an argument (``to`` and ``contiguous`` may return it unchanged)."""


def why_refused(op: str) -> str:
    """Why `op` may not run, as the end of a sentence; empty when it may."""
    if op in ALLOWED:
        return ""
    if op in LOCAL_ONLY:
        return "is a Python function: it runs locally only"
    if reason := reason_against(op):
        return f"is not an allowed operation: it {reason}"
    return "is not on the list of allowed operations"


def random_without_seed(op: str, kwargs: Mapping[str, Any]) -> str:
    """What is wrong with the keyword ``generator`` of `op`, as the end of a sentence; empty when nothing is."""
    if op in RANDOM:
        return (
            ""
            if isinstance(kwargs.get("generator"), Seed)
            else "draws random numbers: it needs generator=, a seed, such as torch.Generator().manual_seed(0)"
        )
    return "has a keyword 'generator', but draws no random numbers" if "generator" in kwargs else ""


def why_no_attribute(name: str) -> str:
    """Why the attribute `name` of a tensor cannot be asked for, as the end of a sentence; empty when it can."""
    if name in ATTRIBUTES:
        return ""
    return f"it {DENIED[name]}" if name in DENIED else "it is not on the list of attributes"


def why_forbidden(name: str) -> str:
    """Why no value of a graph, whatever it is, may be asked for the attribute `name`, as the end of a sentence; else empty."""
    return f"it {DENIED[name]}" if name in FORBIDDEN else ""
