"""tune_step.py: the part of a step that each kernel belongs to, and the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scenarioclip_fast.benchmarks import timing, tune_step

ROOT = Path(__file__).parents[2]
FUNCTOR = "at::native::BinaryFunctor<float, float, float, at::native::binary_internal::MulFunctor<float> >"
FOREACH = "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
COPY = "at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(float)#1}"
NAMES = {
    "products": [
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_kernel__5x_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128_64x3_tn_align8>(Params)",
        "ampere_sgemm_128x64_tn",
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false, false>(int)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true>(int)",
        "triton_tem_fused_addmm_t_view_4",
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, cutlass::bfloat16_t> >(int)",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<64> >(Flash_bwd_params)",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "fmha_cutlassB_bf16_aligned_128x64_k64_sm80(AttentionBackwardKernel::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128x64_4x1x1_kernel0_0",
    ],
    "weights": [
        f"{FOREACH}FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float, 4, ADAM_MODE::ADAMW, false> >",
        f"{FOREACH}TensorListMetadata<1>, LpNormFunctor<float, (NormType)1, float, 1, 1, 0> >(int)",
        "void at::native::lpnorm_cleanup<float, (at::native::NormType)1, float, float>(float const*, float**, int)",
        f"{FOREACH}TensorListMetadata<2>, TernaryOpScalarFunctor<float, 2, 2, 0>, LerpFunctor<float> >",
    ],
    "elementwise": [
        f"void at::native::vectorized_elementwise_kernel<4, {FUNCTOR}, std::array<char*, 3ul> >(int)",
        f"void at::native::unrolled_elementwise_kernel<{COPY}, std::array<char*, 2ul>, 4>(int)",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>(int, float)",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 64u, 1u, 32u>(long)",
        "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float, func_wrapper_t<float> > >(float)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>, unsigned int, 3>",
        "Memcpy HtoD (Pinned -> Device)",
        # Fused with operators next to products and attention, and named after them.
        "triton_poi_fused__to_copy_addmm_silu_backward_t_7",
        "triton_red_fused_native_layer_norm_native_layer_norm_backward_3",
        "triton_per_fused__scaled_dot_product_flash_attention_add_native_layer_norm_2",
        "triton_poi_fused_mul_sigmoid_view_1",
    ],
    "own": [
        "tile_sums",
        "tile_gradients",
        "level_losses",
        "distillation",
        "void scf::(anonymous namespace)::distillation<512>(scf::DistillationProblem)",
        "scf::(anonymous namespace)::draw_masks(scf::MaskJob const*, int const*, unsigned char*)",
        "void scf::(anonymous namespace)::resize_down<__nv_bfloat16>(scf::ViewJob const*, int, unsigned char*)",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_kinds_of_kernels(kind: str, name: str) -> None:
    assert tune_step.kind_of(name) == kind


def test_own_kernels_are_found_in_the_sources() -> None:
    found = tune_step.own_kernels()
    assert {"unit_rows", "level_products", "distillation", "resize_across", "augment"} <= found
    # PyTorch has kernels of the same names.
    assert tune_step.kind_of("void at::native::augment<float>(float*)") == "elementwise"


class Trace:
    """A profile as torch.profiler exports it. Host spans are (start, end) in microseconds."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {}}]

    def host(self, category: str, name: str, start: float, end: float, tid: int = 1, **args: Any) -> None:
        record = {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": tid, "ts": start, "dur": end - start}
        self.records.append({**record, "args": args})

    def kernel(self, name: str, us: float, at: float, tid: int = 1, category: str = "kernel") -> None:
        """Add a kernel that is launched at `at` and runs later."""
        number = len(self.records)
        self.host("cuda_runtime", "cudaLaunchKernel", at, at + 1, tid, correlation=number)
        self.host(category, name, 1e4 + number, 1e4 + number + us, 7, correlation=number)


def op(number: int | None = None, dims: list[int] | None = None) -> dict[str, Any]:
    args: dict[str, Any] = {} if number is None else {"Sequence number": number}
    return args if dims is None else {**args, "Input Dims": [dims, []]}


def profile() -> list[dict[str, Any]]:
    """A step with one vision block, one text block, the backward pass on its own thread, and an update."""
    t = Trace()
    gemm, cast = "nvjet_tst_128x256", f"void at::native::unrolled_elementwise_kernel<{COPY}>(int)"
    t.host("user_annotation", "ProfilerStep#1", 0, 1000)
    t.host("user_annotation", tune_step.VISION, 10, 100)
    t.host("cpu_op", "aten::_to_copy", 12, 20, **op(3, [768, 3072]))
    t.kernel(cast, 10, at=15)  # of a weight
    t.host("cpu_op", "aten::_to_copy", 22, 30, **op(4, [1280, 50, 768]))
    t.kernel(cast, 20, at=25)  # of activations
    t.host("cpu_op", "aten::addmm", 32, 40, **op(5))
    t.kernel(gemm, 40, at=35)
    t.host("cpu_op", "CompiledFunction", 42, 60, **op(6))
    t.kernel("triton_poi_fused__to_copy_t_0", 5, at=45)
    t.kernel("triton_red_fused__to_copy_addmm_native_layer_norm_1", 80, at=50)
    t.kernel("void pytorch_flash::flash_fwd_kernel<64>(Flash_fwd_params)", 160, at=55)
    t.host("cpu_op", "aten::addmm", 110, 120, **op(7))  # of a text
    t.kernel(gemm, 320, at=115)
    t.kernel("tile_sums", 640, at=125)
    t.kernel("Memcpy HtoD (Pinned -> Device)", 2, at=130, category="gpu_memcpy")
    for start, node, number, name, us in (
        (200, "AddmmBackward0", 7, gemm, 1),
        (220, "CompiledFunctionBackward", 6, "triton_poi_fused_silu_backward_2", 3),
        (240, "AddmmBackward0", 5, gemm, 7),
        (260, "torch::autograd::AccumulateGrad", 2**64 - 1, "void at::native::elementwise_kernel<128, 4>(int)", 9),
    ):
        t.host("cpu_op", f"autograd::engine::evaluate_function: {node}", start, start + 15, 2, **op(number))
        t.host("cpu_op", node, start + 2, start + 13, 2, **op(number))
        t.kernel(name, us, at=start + 5, tid=2)
    t.kernel(NAMES["weights"][0], 1280, at=300)
    t.host("kernel", gemm, 5000, 5011, 7, correlation=123456)  # its launch is not in the profile
    return t.records


def test_gpu_profile() -> None:
    found = tune_step.launches(profile(), {(768, 3072), (768,)})
    us = {part: sum(launch.us for launch in found if launch.part == part) for part in tune_step.PARTS}
    assert us == {
        "products": 40 + 7,
        "attention": 160,
        "elementwise": 20 + 80 + 3,
        "weights": 10 + 5 + 9 + 1280,
        "rest": 320 + 640 + 2 + 1 + 11,
    }
    result = tune_step.Result(tune_step.EAGER, 128, step_ms=64.0, needed_tflop=0.0235)
    tune_step.summarise(result, found)
    assert (result.kernels, result.casts) == (len(found) - 1, 3)
    attention = result.rows[1]
    assert (attention.measured_ms, attention.predicted_ms, attention.launches) == (0.16, 5, 1)
    assert result.longest[0] == {"kernel": NAMES["weights"][0], "part": "weights", "ms": 1.28, "launches": 1}
    text = tune_step.table(result)
    assert [line.split() for line in text.splitlines() if line.startswith("  vision: attention")] == [
        ["vision:", "attention", "5", "0.16", "0.03", "1"]
    ]
    assert "0.02 TFLOP of model operations: 500 TFLOP/s" in text and "2000.00" in text  # 128 scenes in 64 ms


def test_predictions_are_for_one_batch_size() -> None:
    assert tune_step.Result(tune_step.EAGER, 256).predicted is None
    for form, total in ((tune_step.EAGER, 90), (tune_step.COMPILED, 68)):
        predicted = tune_step.PREDICTED[form]
        assert predicted.ms.keys() == tune_step.PARTS.keys()
        assert sum(predicted.ms.values()) == pytest.approx(total, abs=1)
        assert predicted.scenes_per_s == pytest.approx(128e3 / sum(predicted.ms.values()), rel=0.01)


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "REHEARSAL", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune_step.main(["--quick"]) == 2
    assert capsys.readouterr().err == "error: torch sees no GPU: there is nothing to measure\n"
