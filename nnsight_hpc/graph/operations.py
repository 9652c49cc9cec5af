"""The operations that a graph may name. What is not here does not run, whatever torch can do.

The list is curated: arithmetic on tensors and nothing else. No file, network, process, pickle, callback, data pointer,
storage, or global state (seed, threads, default device or dtype) is reachable by name, by attribute or by a string.
Names are ``torch.X``, ``torch.nn.functional.X``, ``torch.linalg.X``, ``torch.fft.X``, ``torch.special.X``, ``Tensor.X``,
``operator.X``, ``attribute``, ``einops.X`` and those of the protocol itself (``model.output``, ``save``, …).
"""

from __future__ import annotations

from nnsight_hpc.graph.build import CALL, FORWARD, PARAMETER, READS, SAVE, SETS


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions of torch that are methods of a tensor with the same meaning, too.
_BOTH = _names("""
    abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr all allclose amax amin aminmax angle any arccos
    arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere asin asinh atan atan2 atanh baddbmm
    bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm broadcast_to ceil
    chunk clamp clamp_max clamp_min clip clone conj copysign corrcoef cos cosh count_nonzero cov cross cummax cummin
    cumprod cumsum deg2rad det detach diag diag_embed diagflat diagonal diagonal_scatter diff digamma dist div divide dot
    dsplit eq equal erf erfc erfinv exp exp2 expm1 fix flatten flip fliplr flipud float_power floor floor_divide fmax fmin
    fmod frac frexp gather ge greater greater_equal gt heaviside histc hsplit hypot i0 index_add index_copy index_fill
    index_put index_reduce index_select inner inverse isclose isfinite isinf isnan isneginf isposinf isreal kron kthvalue
    ldexp le lerp less less_equal lgamma log log10 log1p log2 log_softmax logaddexp logaddexp2 logcumsumexp logdet
    logical_and logical_not logical_or logical_xor logit logsumexp lt masked_fill masked_scatter masked_select matmul
    matrix_exp matrix_power max maximum mean median min minimum mm mode moveaxis movedim msort mul multiply mv nan_to_num
    nanmean nanmedian nanquantile nansum narrow ne neg negative nextafter nonzero norm not_equal numel outer permute
    pinverse polygamma positive pow prod quantile rad2deg ravel reciprocal relu remainder renorm repeat_interleave reshape
    roll rot90 round rsqrt scatter scatter_add scatter_reduce select select_scatter sgn sigmoid sign signbit sin sinc sinh
    slice_scatter slogdet softmax sort split sqrt square squeeze std sub subtract sum svd swapaxes swapdims t take
    take_along_dim tan tanh tensor_split tile topk trace transpose tril triu true_divide trunc unbind unflatten unique
    unique_consecutive unsqueeze var vdot vsplit where xlogy
""")

_TORCH_ONLY = _names("""
    arange atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors bucketize cartesian_prod cat cdist celu chain_matmul
    column_stack combinations complex concat concatenate conv1d conv2d conv3d cosine_similarity cumulative_trapezoid
    dstack einsum eye full full_like gradient hstack imag isin layer_norm linspace logspace meshgrid nanmean
    ones ones_like pairwise_distance polar prelu real rms_norm row_stack searchsorted selu stack std_mean
    tensordot trapezoid tril_indices triu_indices vander var_mean vstack zeros zeros_like is_complex is_floating_point
    view_as_complex view_as_real
""")

_METHODS_ONLY = _names("""
    bfloat16 bool byte char contiguous cpu cuda dim double expand expand_as float half int item long ndimension
    new_full new_ones new_tensor new_zeros nelement repeat reshape_as short size stride sum_to_size to tolist type_as
    unfold view view_as is_complex is_floating_point is_contiguous element_size
""")

# In place, on values only: parameters cannot be changed (the schedule refuses it).
_IN_PLACE_METHODS = _names("""
    abs_ add_ addcdiv_ addcmul_ clamp_ clamp_max_ clamp_min_ clip_ copy_ cos_ div_ divide_ exp_ fill_ floor_ index_add_
    index_copy_ index_fill_ index_put_ lerp_ log_ masked_fill_ masked_scatter_ mul_ multiply_ nan_to_num_ neg_ pow_
    reciprocal_ relu_ round_ rsqrt_ scatter_ scatter_add_ sigmoid_ sin_ sqrt_ square_ sub_ subtract_ tanh_ true_divide_
    trunc_ zero_
""")

_FUNCTIONAL = _names("""
    adaptive_avg_pool1d adaptive_max_pool1d avg_pool1d avg_pool2d batch_norm binary_cross_entropy
    binary_cross_entropy_with_logits celu conv1d conv2d cosine_embedding_loss cosine_similarity cross_entropy elu embedding
    gaussian_nll_loss gelu glu group_norm hardshrink hardsigmoid hardswish hardtanh hinge_embedding_loss huber_loss
    kl_div l1_loss layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid
    margin_ranking_loss max_pool1d max_pool2d mish mse_loss multi_margin_loss multilabel_margin_loss nll_loss normalize
    one_hot pad pairwise_distance poisson_nll_loss prelu relu relu6 rms_norm scaled_dot_product_attention selu sigmoid silu
    smooth_l1_loss soft_margin_loss softmax softmin softplus softshrink softsign tanh tanhshrink threshold
    triplet_margin_loss
""")

_LINALG = _names("""
    cholesky cond cross det diagonal eig eigh eigvals eigvalsh inv lstsq lu_factor matmul matrix_exp matrix_norm
    matrix_power matrix_rank multi_dot norm pinv qr slogdet solve solve_triangular svd svdvals vecdot vector_norm
""")

_FFT = _names("""
    fft fft2 fftfreq fftn fftshift hfft ifft ifft2 ifftn ifftshift ihfft irfft irfft2 irfftn rfft rfft2 rfftfreq rfftn
""")

_SPECIAL = _names("entr erf erfc erfinv exp2 expit expm1 log1p log_softmax logit logsumexp ndtr softmax xlogy")

_OPERATORS = _names("""
    abs add and_ eq floordiv ge getitem gt iadd iand ifloordiv imul ior ipow isub itruediv ixor invert le lt matmul mod
    mul ne neg or_ pos pow setitem sub truediv xor
""")

_EINOPS = _names("rearrange reduce repeat")

ATTRIBUTES = _names("shape dtype device ndim T mT H mH real imag")
"""Attributes of a tensor. Of a model's output, its fields may be asked for; of anything else, nothing."""

FIELDS = _names(
    "values indices eigenvalues eigenvectors U S V Vh Q R L LU pivots solution mantissa exponent sign logabsdet"
)
"""Fields of the named tuples that torch's functions return (``x.topk(5).indices``)."""

DENIED_KEYWORDS = _names("out generator inplace pin_memory layout names training max_norm dropout_p _stacklevel")
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
    bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128 half float double short int long
""")

PROTOCOL = frozenset({FORWARD, *READS.values(), *SETS.values(), PARAMETER, CALL, SAVE, "attribute"})

ALLOWED: frozenset[str] = PROTOCOL | {
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

_IN_PLACE_OPERATORS = frozenset(f"operator.{name}" for name in _OPERATORS if name[0] == "i" and name != "invert")
IN_PLACE: frozenset[str] = (
    frozenset(f"Tensor.{name}" for name in _IN_PLACE_METHODS) | _IN_PLACE_OPERATORS | {"operator.setitem"}
)
"""Operations that change the value of their first argument."""

_VIEWS = _names("""
    atleast_1d atleast_2d atleast_3d bfloat16 bool broadcast_tensors broadcast_to byte char chunk conj contiguous cpu cuda
    detach diagonal double dsplit expand expand_as flatten float half hsplit imag int long moveaxis movedim narrow permute
    positive ravel real reshape reshape_as select short split squeeze sum_to_size swapaxes swapdims t tensor_split to
    transpose type_as unbind unflatten unfold unsqueeze view view_as view_as_complex view_as_real vsplit
""")
VIEWS: frozenset[str] = frozenset(f"{prefix}.{name}" for prefix in ("torch", "Tensor") for name in _VIEWS) | {
    "operator.getitem",
    "operator.pos",
    "attribute",
    "einops.rearrange",
    "einops.reduce",
    "einops.repeat",
    "torch.cartesian_prod",
    "torch.chain_matmul",
    "torch.einsum",
    "torch.linalg.diagonal",
    "torch.meshgrid",
}
"""Operations whose result may share memory with an argument (``to`` and ``contiguous`` may return it unchanged)."""

_WHY_DENIED: tuple[tuple[str, frozenset[str]], ...] = (
    ("reads or writes files", _names("load save from_file get_file_path")),
    (
        "hands out memory",
        _names("""
        data data_ptr const_data_ptr storage untyped_storage storage_offset storage_type numpy from_numpy frombuffer
        from_dlpack to_dlpack set_ as_strided share_memory_ resize_ resize_as_ record_stream
    """),
    ),
    ("shows memory that may hold somebody else's values", _names("empty empty_like empty_strided new_empty")),
    ("writes into its arguments", _names("instance_norm")),
    (
        "calls a Python function",
        _names("""
        apply_ map_ map2_ register_hook register_post_accumulate_grad_hook vmap cond while_loop compile
    """),
    ),
    (
        "changes the state of the whole process",
        _names("""
        manual_seed seed set_rng_state set_num_threads set_num_interop_threads set_default_device set_default_dtype
        set_default_tensor_type set_printoptions set_flush_denormal set_grad_enabled use_deterministic_algorithms
        set_float32_matmul_precision set_warn_always
    """),
    ),
    (
        "draws random numbers without an explicit seed",
        _names("""
        rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal poisson dropout svd_lowrank
        alpha_dropout feature_dropout uniform_ normal_ random_ bernoulli_ exponential_ geometric_ log_normal_ cauchy_
        gumbel_softmax rrelu
    """),
    ),
    ("loads code", _names("import_ir_module import_ir_module_from_buffer parse_ir")),
)


def why_refused(op: str) -> str:
    """Why `op` may not run, as the end of a sentence; empty when it may."""
    if op in ALLOWED:
        return ""
    name = op.rpartition(".")[2]
    for reason, names in _WHY_DENIED:
        if name in names:
            return f"is not an allowed operation: it {reason}"
    return "is not on the list of allowed operations"
