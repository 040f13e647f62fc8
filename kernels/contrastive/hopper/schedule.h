// How the tiles of a problem are distributed over the device.
#pragma once

#include <cstdint>

#include "kernels/contrastive/contrastive.h"

namespace scf::hopper {

// Tiles whose blocks share their loads. Two by two: 32 bytes of L2 per cycle and multiprocessor at the full rate of the
// tensor cores; two by one would take 48.
constexpr int kClusterRows = 2, kClusterTexts = 2;

// How many clusters side by side the scheduler goes through together, so that concurrent tiles share operands in L2. It
// rounds both sides of the grid up to whole groups, and tiles past the end cost as much as others.
inline int clusters_together(int64_t rows, int64_t texts) {
  const auto tiles = [&](int64_t together) {
    const auto rounded = [&](int64_t count, int64_t side) {
      return (count + side * together - 1) / (side * together) * together;
    };
    return static_cast<double>(rounded(rows, kClusterRows * kTileRows)) *
           static_cast<double>(rounded(texts, kClusterTexts * kTileTexts));
  };
  // Without groups, large problems are estimated to be limited by memory bandwidth.
  constexpr struct {
    int together;
    double cost;
  } choices[] = {{8, 1.01}, {4, 1.02}, {2, 1.05}};
  for (const auto& choice : choices) {
    if (tiles(choice.together) <= choice.cost * tiles(1)) return choice.together;
  }
  return 1;
}

}  // namespace scf::hopper
