"""Why the rest of torch is not among the allowed operations: every public name that is left out, by reason.

A test walks torch, its tensors and its namespaces, and fails when a new version brings a name that is neither allowed nor
here. Names stand for themselves in every namespace; what is allowed in one of them is asked first.
"""

from __future__ import annotations

_REACHES_OUT: dict[str, str] = {
    "reads or writes files": "load save from_file get_file_path module_load",
    "loads or compiles code": """
        import_ir_module import_ir_module_from_buffer parse_ir parse_schema parse_type_comment merge_type_from_type_comment
        unify_type_list compile get_device_module classproperty
    """,
    "calls a Python function": """
        apply_ map_ map2_ register_hook register_post_accumulate_grad_hook vmap cond while_loop fork wait
        triplet_margin_with_distance_loss boolean_dispatch handle_torch_function
    """,
    "hands out memory by address, or shares it with others": """
        data data_ptr const_data_ptr storage untyped_storage storage_offset storage_type numpy asarray from_numpy frombuffer
        from_dlpack to_dlpack set_ as_strided as_strided_ as_strided_copy as_strided_scatter share_memory_ is_shared is_set_to
        record_stream pin_memory is_pinned is_storage alias_copy
    """,
    "changes the size or the strides of a tensor in place": """
        resize resize_ resize_as resize_as_ resize_as_sparse_ sparse_resize_ sparse_resize_and_clear_ squeeze_ unsqueeze_ t_
        transpose_ swapaxes_ swapdims_ detach_
    """,
    "shows memory that may hold somebody else's values": """
        empty empty_like empty_permuted empty_quantized empty_strided new new_empty new_empty_strided
    """,
    "trusts numbers that it is given, and may read or write past the end of memory": """
        ctc_loss embedding_bag embedding_renorm_ ldl_solve lu_solve lu_unpack segment_reduce max_unpool1d max_unpool2d
        max_unpool3d unsafe_chunk unsafe_split unsafe_split_with_sizes slice_inverse index scaled_mm scaled_grouped_mm
        grouped_mm
    """,
    "reads or changes the state of the whole process": """
        manual_seed seed initial_seed get_rng_state set_rng_state thread_safe_generator default_generator set_num_threads
        get_num_threads set_num_interop_threads get_num_interop_threads init_num_threads set_default_device get_default_device
        set_default_dtype get_default_dtype set_default_tensor_type set_printoptions set_flush_denormal set_grad_enabled
        is_grad_enabled enable_grad no_grad inference_mode is_inference is_inference_mode_enabled use_deterministic_algorithms
        are_deterministic_algorithms_enabled is_deterministic_algorithms_warn_only_enabled get_deterministic_debug_mode
        set_deterministic_debug_mode set_float32_matmul_precision get_float32_matmul_precision set_warn_always
        is_warn_always_enabled set_anomaly_enabled is_anomaly_enabled is_anomaly_check_nan_enabled autocast
        autocast_decrement_nesting autocast_increment_nesting clear_autocast_cache get_autocast_cpu_dtype get_autocast_dtype
        get_autocast_gpu_dtype get_autocast_ipu_dtype get_autocast_xla_dtype is_autocast_cache_enabled is_autocast_cpu_enabled
        is_autocast_enabled is_autocast_ipu_enabled is_autocast_xla_enabled set_autocast_cache_enabled set_autocast_cpu_dtype
        set_autocast_cpu_enabled set_autocast_dtype set_autocast_enabled set_autocast_gpu_dtype set_autocast_ipu_dtype
        set_autocast_ipu_enabled set_autocast_xla_dtype set_autocast_xla_enabled prepare_multiprocessing_environment
        profiler_allow_cudagraph_cupti_lazy_reinit_cuda12 compiled_with_cxx11_abi is_vulkan_available cudnn_is_acceptable
    """,
}

_LEFT_OUT: dict[str, str] = {
    "takes time or memory that grows with a number that it is given": """
        chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w hermite_polynomial_h
        hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p shifted_chebyshev_polynomial_t
        shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w mvlgamma mvlgamma_
        polygamma polygamma_ binomial
        multigammaln combinations
    """,
    "draws random numbers and takes no seed": """
        alpha_dropout alpha_dropout_ dropout dropout_ dropout1d dropout2d dropout3d feature_alpha_dropout
        feature_alpha_dropout_ feature_dropout feature_dropout_ fractional_max_pool2d fractional_max_pool2d_with_indices
        fractional_max_pool3d fractional_max_pool3d_with_indices gumbel_softmax lobpcg multi_head_attention_forward
        native_dropout pca_lowrank rrelu rrelu_ svd_lowrank
    """,
    "writes into its arguments": "instance_norm batch_norm_update_stats fused_moving_avg_obs_fake_quant",
    "belongs to the gradient: a graph reads and sets it with its own operations (x.grad, loss.backward())": """
        backward grad grad_fn grad_dtype retain_grad retains_grad output_nr volatile reinforce
    """,
    "makes or needs a sparse, nested or packed tensor, which graphs do not hold": """
        sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor sparse_coo_tensor sparse_csc_tensor sparse_csr_tensor
        sparse_dim sparse_mask dense_dim coalesce is_coalesced indices values crow_indices col_indices ccol_indices
        row_indices crow_indices_copy col_indices_copy ccol_indices_copy row_indices_copy indices_copy values_copy to_sparse
        to_sparse_bsc to_sparse_bsr to_sparse_coo to_sparse_csc to_sparse_csr to_dense to_mkldnn to_padded_tensor dsmm hsmm
        hspmm saddmm smm spmm sspaddmm is_mkldnn is_nested is_sparse is_sparse_csr
    """,
    "is for quantised tensors, which graphs do not hold": """
        choose_qparams_optimized dequantize fake_quantize_per_channel_affine fake_quantize_per_tensor_affine
        fbgemm_linear_fp16_weight fbgemm_linear_fp16_weight_fp32_activation fbgemm_linear_int8_weight
        fbgemm_linear_int8_weight_fp32_activation fbgemm_linear_quantize_weight fbgemm_pack_gemm_matrix_fp16
        fbgemm_pack_quantized_matrix int_repr is_quantized q_per_channel_axis q_per_channel_scales q_per_channel_zero_points
        q_scale q_zero_point qscheme quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic quantized_batch_norm
        quantized_gru quantized_gru_cell quantized_lstm quantized_lstm_cell quantized_max_pool1d quantized_max_pool2d
        quantized_max_pool3d quantized_rnn_relu_cell quantized_rnn_tanh_cell
    """,
    "is an inner part of torch; its public form is in torch.nn.functional, a module of the model, or another operation": """
        affine_grid_generator batch_norm_backward_elemt batch_norm_backward_reduce batch_norm_elemt batch_norm_gather_stats
        batch_norm_gather_stats_with_counts batch_norm_stats convolution cudnn_affine_grid_generator cudnn_batch_norm
        cudnn_convolution cudnn_convolution_add_relu cudnn_convolution_relu cudnn_convolution_transpose cudnn_grid_sampler
        detach_copy diagonal_copy expand_copy narrow_copy permute_copy select_copy slice_copy split_copy
        split_with_sizes_copy squeeze_copy t_copy transpose_copy unbind_copy unfold_copy unsqueeze_copy view_as_complex_copy
        view_as_real_copy view_copy grid_sampler grid_sampler_2d grid_sampler_3d gru gru_cell lstm lstm_cell rnn_relu
        rnn_relu_cell rnn_tanh rnn_tanh_cell miopen_batch_norm miopen_convolution miopen_convolution_add_relu
        miopen_convolution_relu miopen_convolution_transpose miopen_ctc_loss miopen_depthwise_convolution miopen_rnn
        mkldnn_adaptive_avg_pool2d mkldnn_convolution mkldnn_linear_backward_weights mkldnn_max_pool2d mkldnn_max_pool3d
        mkldnn_rnn_layer native_batch_norm native_channel_shuffle native_group_norm native_layer_norm native_norm
        norm_except_dim frobenius_norm nuclear_norm max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
        adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
        sym_constrain_range sym_constrain_range_for_size sym_float sym_fresh_size sym_int sym_ite sym_max sym_min sym_not
        sym_sqrt sym_sum has_torch_function has_torch_function_unary has_torch_function_variadic assert_int_or_pair typename
        is_tensor is_distributed name as_subclass batch_norm binary_cross_entropy_with_logits cosine_embedding_loss embedding
        group_norm hinge_embedding_loss kl_div margin_ranking_loss poisson_nll_loss threshold triplet_margin_loss
        adaptive_avg_pool1d adaptive_max_pool1d avg_pool1d max_pool1d max_pool2d max_pool3d
    """,
    "is not in every version of torch that graphs run on": "hash_tensor linear_cross_entropy",
    "was removed from torch, or has a successor there": """
        eig lstsq lu matrix_rank solve symeig triangular_solve range upsample upsample_bilinear upsample_nearest
    """,
    "is for devices or number formats that no model here has": """
        chalf get_device ipu is_ipu is_maia is_meta is_mps is_mtia is_vulkan is_xla is_xpu mtia xpu
    """,
    "is a module or a context, not an operation": """
        accelerator amp ao autograd backends builtins classes compiler cpp cpu ctypes cuda dataclasses distributed
        distributions export fft func functional functools futures fx glob hub importlib inspect jit library linalg masked
        math monitor mps multiprocessing nested nn np ops optim os overrides package platform profiler quantization
        quasirandom random return_types serialization signal sparse special sys testing textwrap threading torch
        torch_version types utils version warnings windows
    """,
    "is a type or a constant, not an operation": """
        dtype device finfo iinfo layout memory_format
        bit bits16 bits1x8 bits2x4 bits4x2 bits8 cdouble cfloat complex128 complex32 complex64 float16 float32
        float4_e2m1fn_x2 float64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu int1 int16 int2 int3
        int32 int4 int5 int6 int64 int7 int8 qint32 qint8 quint2x4 quint4x2 quint8 uint1 uint16 uint2 uint3 uint32 uint4
        uint5 uint6 uint64 uint7 uint8 bfloat16 bool double float half int long short
        channels_last channels_last_3d contiguous_format legacy_contiguous_format preserve_format jagged strided sparse_bsc
        sparse_bsr sparse_coo sparse_csc sparse_csr per_channel_affine per_channel_affine_float_qparams per_channel_symmetric
        per_tensor_affine per_tensor_symmetric e inf nan newaxis pi
        has_lapack has_mkl has_openmp has_spectral common_args common_notes factory_common_args multi_dim_common
        reproducibility_notes sparse_support_notes tf32_notes
    """,
}

BY_REASON = {**_REACHES_OUT, **_LEFT_OUT}

DENIED: dict[str, str] = {name: reason for reason, names in BY_REASON.items() for name in names.split()}
"""Why an operation or attribute of this name is refused."""


FORBIDDEN = frozenset(name for names in _REACHES_OUT.values() for name in names.split())
"""Those that reach out of the arithmetic: files, code, memory, the process. They are no name of an attribute of anything."""


def reason_against(op: str) -> str:
    """Why `op`, an operation that is not allowed, is left out; empty when nobody has thought of it."""
    namespace, _, name = op.rpartition(".")
    if name in DENIED:
        return DENIED[name]
    if name[:1].isupper():
        return DENIED["dtype"]
    if name.endswith("_") and namespace != "Tensor":
        return "changes its argument: write it as the method of a value"
    return ""
