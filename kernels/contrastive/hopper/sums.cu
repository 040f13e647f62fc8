// Forward: row and column sums of exponentials, and the exponents of the positives.
#include "kernels/contrastive/hopper/kernel.h"

namespace scf {
namespace hopper {

template <class Problem>  // a parameter, because nvcc's host code does not compile otherwise
struct SumsEpilogue : Epilogue<Problem> {
  using Base = Epilogue<Problem>;
  using Arguments = Problem;
  using Params = Problem;
  using Scratch = SumScratch<kTileRows, kTileTexts, kEpilogueWarps>;
  struct SharedStorage {
    struct TensorStorage {
      // So that the operands, which follow, begin where the pattern of their 128-byte swizzle does.
      alignas(1024) Scratch scratch;
    } tensors;
    using PipelineStorage = typename Base::PipelineStorage;
    PipelineStorage pipeline;
  };
  using TensorStorage = typename SharedStorage::TensorStorage;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params&) {}
  CUTLASS_HOST_DEVICE SumsEpilogue(const Params& params, TensorStorage&) : params(params) {}

  template <class Shape, class TileShape, class Coordinates, class Accumulators, class Mma>
  CUTLASS_DEVICE auto store(typename Base::LoadPipeline, typename Base::LoadPipelineState load_state,
                            typename Base::StorePipeline, typename Base::StorePipelineState store_state, const Shape&,
                            TileShape, const Coordinates& tile, Accumulators& accumulators, Mma mma, int thread,
                            TensorStorage& shared, int = -1) {
    sum_tile<kTileRows, kTileTexts, kEpilogueWarps>(params, get<0>(tile), get<1>(tile), accumulators, mma, thread,
                                                    shared.scratch, Base::sync);
    return cute::make_tuple(load_state, store_state);
  }
  CUTLASS_DEVICE auto store_tail(typename Base::LoadPipeline, typename Base::LoadPipelineState load_state,
                                 typename Base::StorePipeline, typename Base::StorePipelineState store_state) {
    return cute::make_tuple(load_state, store_state);
  }

  const Params& params;
};

}  // namespace hopper

const char* sums_hopper(const SumsProblem& problem, cudaStream_t stream) {
  return hopper::launch<hopper::SumsEpilogue<SumsProblem>>(problem, stream);
}

}  // namespace scf
