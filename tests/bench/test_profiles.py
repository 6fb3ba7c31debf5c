"""What the profiler saw, and kernels by what they are named."""

import pytest
import torch

from graphfuse.bench.profiles import by_category, category, of


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTN", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x1_tn_align8>", "GEMM"),
        ("triton_tem_fused_mm_3", "GEMM"),
        ("aten::mm", "GEMM"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128_4x1x1", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("rms_norm_kernel", "norm"),
        ("layer_norm_backward_kernel", "norm"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3", "norm"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::rsqrt_kernel_cuda(at::TensorIteratorBase&)>",
            "norm",
        ),
        ("rope_kernel", "rope"),
        ("_triton_rope", "rope"),
        ("triton_poi_fused_add_cat_cos_mul_neg_sin_5", "rope"),
        ("_glu_backward_kernel", "gate"),
        ("_swiglu_forward_kernel", "gate"),
        ("triton_poi_fused_mul_silu_7", "gate"),
        ("_softmax_grad_kernel", "head and loss"),
        ("_add_product_kernel", "GEMM"),
        ("_token_losses_kernel", "head and loss"),
        ("liger_cross_entropy_kernel", "head and loss"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>", "head and loss"),
        ("triton_red_fused__log_softmax_mm_9", "head and loss"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_2", "copy and cast"),
        ("triton_poi_fused__to_copy_2", "copy and cast"),
        ("Memcpy DtoD (Device -> Device)", "copy and cast"),
        ("Memset (Device)", "copy and cast"),
        ("embedding_backward_feature_kernel", "embedding"),
        ("triton_poi_fused_add_4", "other"),
    ],
)
def test_tells_kernels_by_their_names(kernel, expected):
    assert category(kernel) == expected


def test_every_triton_kernel_of_graphfuse_has_a_category():
    from tests.test_house import ROOT

    names = {
        line.removeprefix("def ").partition("(")[0]
        for path in (ROOT / "kernels").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.partition("(")[0].endswith("_kernel")
    }
    assert len(names) > 10
    assert {name for name in names if category(name) == "other"} == set()


def test_adds_up():
    assert by_category([("aten::mm", 1000.0), ("rms_norm_kernel", 3000.0), ("aten::bmm", 1000.0)]) == {
        "norm": 3.0,
        "GEMM": 2.0,
    }


@pytest.mark.gpu
def test_profiles_kernels_on_a_gpu():
    a = torch.randn(512, 512, device="cuda")
    found = of(lambda: (a @ a).softmax(-1), torch.device("cuda")).by_category
    assert set(found) == {"GEMM", "head and loss"}
    assert 0 < sum(found.values()) < 100


def test_profiles_operations_on_a_cpu():
    a = torch.randn(512, 512)
    profile = of(lambda: (a @ a).softmax(-1), torch.device("cpu"))
    assert profile.by_category["GEMM"] > 0
    assert profile.by_category["head and loss"] > 0
    assert 2 * a.nbytes <= profile.peak_bytes <= 3 * a.nbytes
