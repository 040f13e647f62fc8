// CUTLASS's warp-specialised kernel for sm_90 with our own epilogue: TMA multicast within clusters, and two warp
// groups that alternate, so that one computes its epilogue during the products of the other.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/bfloat16.h>
#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/version.h>

#include <atomic>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "kernels/contrastive/hopper/schedule.h"
#include "kernels/contrastive/hopper/tile.h"

#ifndef NDEBUG
#error "device asserts put a call beside the main loop, which serialises every wgmma: compile with -DNDEBUG"
#endif
static_assert(CUTLASS_MAJOR == 4 && CUTLASS_MINOR == 2, "expected the headers of CUTLASS 4.2");

namespace scf::hopper {

using Bfloat16 = cutlass::bfloat16_t;
using TileShape = cute::Shape<cute::Int<kTileRows>, cute::Int<kTileTexts>, cute::_64>;
using Cluster = cute::Shape<cute::Int<kClusterRows>, cute::Int<kClusterTexts>, cute::_1>;
constexpr int kEpilogueWarps = 4;

// What the kernel requires of an epilogue that loads nothing, besides store and store_tail.
template <class Problem>
struct Epilogue {
  using ElementC = void;
  using ElementD = void;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  using LoadPipeline = cutlass::PipelineTransactionAsync<1>;
  using LoadPipelineState = cutlass::PipelineState<1>;
  using StorePipeline = cutlass::PipelineTmaStore<1>;
  using StorePipelineState = cutlass::PipelineState<1>;
  using PipelineStorage = typename LoadPipeline::SharedStorage;
  static constexpr bool RequiresTransactionBytes = false;

  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Problem&) {
    return 0;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Problem&) {
    return true;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Problem&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Tile>
  CUTLASS_HOST_DEVICE static constexpr int get_load_pipe_increment(Tile) {
    return 1;
  }
  template <class Tile>
  CUTLASS_HOST_DEVICE static constexpr int get_store_pipe_increment(Tile) {
    return 1;
  }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  template <class... Arguments>
  CUTLASS_DEVICE auto load(LoadPipeline, LoadPipelineState state, Arguments&&...) {
    return state;
  }
  CUTLASS_DEVICE auto load_tail(LoadPipeline, LoadPipelineState state) { return state; }

  CUTLASS_DEVICE static void sync() {
    cutlass::arch::NamedBarrier::sync(kEpilogueWarps * 32, cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
  }
};

template <class Epilogue>
struct Kernel {
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Bfloat16, cutlass::layout::RowMajor, 8, Bfloat16,
      cutlass::layout::ColumnMajor, 8, float, TileShape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Type = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
};

// Properties of a device, found at the first launch on it.
template <class Type>
const char* prepare(cutlass::KernelHardwareInfo& info) {
  constexpr int kDevices = 64;
  static std::atomic<int> clusters[kDevices];  // 0: not yet known
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (device >= kDevices) return "device number 64 or more";
  int active = clusters[device].load();
  if (active == 0) {
    const auto kernel = reinterpret_cast<const void*>(cutlass::device_kernel<Type>);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Type::SharedStorageSize);
    if (error == cudaSuccess) {
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), 1);
      config.blockDim = Type::get_block_shape();
      config.dynamicSmemBytes = Type::SharedStorageSize;
      config.attrs = &cluster;
      config.numAttrs = 1;
      error = cudaOccupancyMaxActiveClusters(&active, kernel, &config);
    }
    if (error != cudaSuccess) {
      cudaGetLastError();  // clear the error: it is reported here, not by the next call
      return cudaGetErrorString(error);
    }
    if (active == 0) return "no cluster of four blocks fits this device";
    clusters[device].store(active);
  }
  info.device_id = device;
  info.sm_count = multiprocessors;
  info.max_active_clusters = active;
  return nullptr;
}

// Null on success, otherwise the error.
template <class Epilogue, class Problem>
const char* launch(const Problem& problem, cudaStream_t stream) {
  using Type = typename Kernel<Epilogue>::Type;
  const Operands& operands = problem.operands;
  if (operands.rows == 0 || operands.texts == 0) return nullptr;
  typename Type::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {static_cast<int>(operands.rows), static_cast<int>(operands.texts),
                             static_cast<int>(operands.width), 1};
  arguments.mainloop = {reinterpret_cast<const Bfloat16*>(operands.x),
                        {operands.x_stride, cute::_1{}, 0},
                        reinterpret_cast<const Bfloat16*>(operands.y),
                        {operands.y_stride, cute::_1{}, 0}};
  arguments.epilogue = problem;
  if (const char* error = prepare<Type>(arguments.hw_info)) return error;
  arguments.scheduler.max_swizzle_size = clusters_together(operands.rows, operands.texts);
  if (!Type::can_implement(arguments)) return "CUTLASS cannot run this problem: rows that TMA does not take";
  auto parameters = Type::to_underlying_arguments(arguments, nullptr);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), 1};
  cudaLaunchConfig_t config{};
  config.gridDim = Type::get_grid_shape(parameters);
  config.blockDim = Type::get_block_shape();
  config.dynamicSmemBytes = Type::SharedStorageSize;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* arguments_of_kernel[] = {&parameters};
  const cudaError_t error =
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(cutlass::device_kernel<Type>), arguments_of_kernel);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clear the error: it is reported here, not by the next call
  return cudaGetErrorString(error);
}

}  // namespace scf::hopper
