// Backward: H, the gradient of the logits folded with the norms, in bfloat16.
#include "kernels/contrastive/hopper/kernel.h"

namespace scf {
namespace hopper {

template <class Problem>  // a parameter, because nvcc's host code does not compile otherwise
struct GradientsEpilogue : Epilogue<Problem> {
  using Base = Epilogue<Problem>;
  using Scratch = GradientScratch<kTileRows, kTileTexts, kEpilogueWarps>;
  using Staging = StagingLayout<kTileRows, kTileTexts>;
  using Stride = cute::Stride<int64_t, cute::_1>;
  using Out = decltype(cute::make_tensor(cute::make_gmem_ptr(static_cast<Bfloat16*>(nullptr)), cute::make_shape(0, 0),
                                         Stride{}));
  using Store = decltype(cute::make_tma_copy(cute::SM90_TMA_STORE{}, Out{}, Staging{}));

  using Arguments = Problem;
  struct Params {
    Problem problem;
    Store store;
  };
  struct SharedStorage {
    struct TensorStorage {
      alignas(1024) Bfloat16 staging[cute::cosize_v<Staging>];
      Scratch scratch;
    } tensors;
    using PipelineStorage = typename Base::PipelineStorage;
    PipelineStorage pipeline;
  };
  using TensorStorage = typename SharedStorage::TensorStorage;

  template <class Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    auto out = cute::make_tensor(
        cute::make_gmem_ptr(reinterpret_cast<Bfloat16*>(arguments.out)),
        cute::make_shape(static_cast<int>(arguments.operands.rows), static_cast<int>(arguments.operands.texts)),
        Stride{arguments.stride, cute::_1{}});
    return {arguments, cute::make_tma_copy(cute::SM90_TMA_STORE{}, out, Staging{})};
  }
  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    cute::prefetch_tma_descriptor(params.store.get_tma_descriptor());
  }
  CUTLASS_HOST_DEVICE GradientsEpilogue(const Params& params, TensorStorage&) : params(params) {}

  template <class Shape, class TileShape, class Coordinates, class Accumulators, class Mma>
  CUTLASS_DEVICE auto store(typename Base::LoadPipeline, typename Base::LoadPipelineState load_state,
                            typename Base::StorePipeline, typename Base::StorePipelineState store_state, const Shape&,
                            TileShape, const Coordinates& tile, Accumulators& accumulators, Mma mma, int thread,
                            TensorStorage& shared, int = -1) {
    const Operands& operands = params.problem.operands;
    const int tile_row = get<0>(tile), tile_column = get<1>(tile);
    // The grid is rounded up to whole clusters, so that some tiles may lie past the end.
    if (tile_row * kTileRows < operands.rows && tile_column * kTileTexts < operands.texts) {
      gradient_tile<kTileRows, kTileTexts, kEpilogueWarps>(params.problem, tile_row, tile_column, accumulators, mma,
                                                           thread, shared.scratch, Base::sync);
      write(tile_row, tile_column, accumulators, mma, thread, shared.staging);
    }
    return cute::make_tuple(load_state, store_state);
  }
  // The kernel lets the other warp group use the staging memory after this.
  CUTLASS_DEVICE auto store_tail(typename Base::LoadPipeline, typename Base::LoadPipelineState load_state,
                                 typename Base::StorePipeline, typename Base::StorePipelineState store_state) {
    cute::tma_store_wait<0>();
    return cute::make_tuple(load_state, store_state);
  }

  template <class Accumulators, class Mma>
  CUTLASS_DEVICE void write(int tile_row, int tile_column, const Accumulators& accumulators, Mma mma, int thread,
                            Bfloat16* memory) {
    auto staging = cute::make_tensor(cute::make_smem_ptr(memory), Staging{});
    stage_tile<cute::SM90_U32x4_STSM_N>(accumulators, mma, thread,
                                        cute::as_position_independent_swizzle_tensor(staging));
    cute::tma_store_fence();
    Base::sync();
    if (thread == 0) {
      auto out =
          params.store.get_tma_tensor(cute::make_shape(params.problem.operands.rows, params.problem.operands.texts));
      auto block = cute::local_tile(out, cute::Shape<cute::Int<kTileRows>, cute::Int<kTileTexts>>{},
                                    cute::make_coord(tile_row, tile_column));
      auto tma = params.store.get_slice(0);
      cute::copy(params.store, tma.partition_S(staging), tma.partition_D(block));
      cute::tma_store_arrive();
    }
  }

  const Params& params;
};

}  // namespace hopper

const char* gradients_hopper(const GradientsProblem& problem, cudaStream_t stream) {
  return hopper::launch<hopper::GradientsEpilogue<GradientsProblem>>(problem, stream);
}

}  // namespace scf
