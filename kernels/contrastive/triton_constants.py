"""Constants of the Triton kernels. Logits are in base 2: cosines times k2 = scale * log2(e)."""

from __future__ import annotations

import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# exp2 flushes results below 2^-126 to zero. A largest possible logit, k2, above 100 is shifted to 100, and 2^27 terms
# stay finite; smaller scales get no offset, which would cost precision. Sums outside [LOW, HIGH] are recomputed with a
# running maximum: relative to a sum of at least LOW, terms above 2^-26 are kept, whose weight is at most HEAVIEST.
HEADROOM = tl.constexpr(100.0)
LOW = tl.constexpr(2.0**-80)
HIGH = tl.constexpr(2.0**127)
# A heavier text makes sums infinite or NaN, so that they are recomputed.
HEAVIEST = tl.constexpr(2.0**20)
