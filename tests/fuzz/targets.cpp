// Fuzz targets of the native code that needs neither torch nor Python. Arrays have memory of their own and of the exact
// size, so that AddressSanitizer notices a single element too many.
#include <cmath>
#include <optional>
#include <string>
#include <string_view>

#include "csrc/host/jpeg.h"
#include "csrc/host/jpeg_scan.h"
#include "csrc/host/rle.h"
#include "csrc/host/segments.h"
#include "csrc/host/views.h"
#include "driver.h"
#include "kernels/add_layer_norm/add_layer_norm.h"
#include "kernels/contrastive/contrastive_cpu.h"
#include "kernels/distillation/distillation.h"
#include "kernels/quick_gelu/quick_gelu.h"
#include "kernels/views/check.h"
#include "kernels/views/jobs.h"
#include "kernels/views/pixel.h"
#include "kernels/views/views.h"

namespace {

using fuzz::Input;
using fuzz::require;

const scf::Parallel in_parts([](int64_t count, int64_t grain, scf::Parallel::Body body, void* context) {
  for (int64_t begin = 0; begin < count; begin += grain) body(begin, std::min(begin + grain, count), context);
});

std::string_view text_of(const uint8_t* data, size_t size) { return {reinterpret_cast<const char*>(data), size}; }

void rle(const uint8_t* data, size_t size) {
  const std::string_view text = text_of(data, size);
  std::optional<std::vector<int64_t>> runs;
  try {
    runs.emplace(scf::rle_count(text));
    scf::rle_decompress(text, runs->data());
  } catch (const std::invalid_argument&) {
    runs.reset();
  }
  if (runs) {
    const std::string again = scf::rle_compress(runs->data(), static_cast<int64_t>(runs->size()));
    std::vector<int64_t> decoded(scf::rle_count(again));
    scf::rle_decompress(again, decoded.data());
    require(decoded == *runs, "rle: other runs after another round");
  }
  // The other decoder accepts the same texts with a number, if the pixels are right and one is set.
  scf::MaskDecoder decoder;
  const std::optional<int64_t> count = decoder.count(text);
  if (runs && !runs->empty()) require(count == static_cast<int64_t>(runs->size()), "rle: another count of runs");
  if (!count) return;
  int64_t sum = 0, ones = 0;
  for (size_t k = 0; runs && k < runs->size(); ++k) sum += (*runs)[k], ones += k % 2 == 1 ? (*runs)[k] : 0;
  std::vector<int32_t> found(*count);
  const bool accepted = decoder.decode(text, sum, found.data());
  require(accepted == (runs && ones > 0), "rle: accepted by one decoder only");
  if (accepted) require(std::equal(found.begin(), found.end(), runs->begin()), "rle: the decoders differ");
}

void segments(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t height = in.below(12), width = in.below(12);
  std::vector<uint8_t> pixels(height * width * 3);
  for (int64_t k = 0; k < height * width; ++k) {
    const bool other = in.one_in(3);  // neighbours are often equal
    for (int c = 0; c < 3; ++c) pixels[3 * k + c] = other || k == 0 ? in.number<uint8_t>() % 3 : pixels[3 * k + c - 3];
  }
  std::vector<int64_t> ids;
  for (int64_t k = in.below(6); k > 0; --k) {
    const int64_t id = in.one_in(4) ? in.number<int64_t>() : (in.below(3) | in.below(3) << 8 | in.below(3) << 16);
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  const std::vector<scf::Segment> found = scf::find_segments(pixels.data(), height, width, ids);
  for (size_t k = 0; k < ids.size(); ++k) {
    std::vector<bool> mask;
    bool value = false;
    for (const int64_t run : found[k].runs) mask.insert(mask.end(), run, value), value = !value;
    require(static_cast<int64_t>(mask.size()) == height * width, "segments: runs of another length");
    int64_t area = 0;
    for (int64_t at = 0; at < height * width; ++at) {
      const int64_t x = at / height, y = at % height;
      const uint8_t* pixel = pixels.data() + 3 * (y * width + x);
      const bool inside = (pixel[0] | pixel[1] << 8 | pixel[2] << 16) == ids[k];
      require(mask[at] == inside, "segments: another mask");
      const auto& box = found[k].box;
      require(!inside || (x >= box[0] && y >= box[1] && x < box[2] && y < box[3]), "segments: a pixel outside the box");
      area += inside;
    }
    require(found[k].empty() == (area == 0), "segments: wrongly empty");
  }
}

void jpeg(const uint8_t* data, size_t size) {
  const std::string_view bytes = text_of(data, size);
  const auto header = scf::jpeg_header(bytes);
  // A progressive scan has a word of memory per block, and a text of all zeros as many as it likes.
  if (header && int64_t{header->height} * header->width > 1 << 22) return;
  scf::JpegScans(bytes).damage();
}

// Images, masks and a plan, first valid, then with a few numbers replaced.
struct Scene {
  std::vector<std::vector<uint8_t>> pixels;
  std::vector<scf::Image> images;
  std::vector<int32_t> mask_runs, mask_size;
  std::vector<int64_t> mask_start = {0}, shapes;

  explicit Scene(Input& in) {
    for (int64_t k = in.between(1, 3); k > 0; --k) {
      const int64_t height = in.between(1, 40), width = in.between(1, 40);
      pixels.emplace_back(height * width * 3);
      for (uint8_t& value : pixels.back()) value = static_cast<uint8_t>(37 * (&value - pixels.back().data()));
      for (int64_t m = in.between(1, 2); m > 0; --m) add_mask(in, height, width);
      shapes.insert(shapes.end(), {height, width});
    }
    for (size_t k = 0; k < pixels.size(); ++k) images.push_back({pixels[k].data(), shapes[2 * k], shapes[2 * k + 1]});
  }

  void add_mask(Input& in, int64_t height, int64_t width) {
    int64_t left = height * width;
    for (bool ones = false; left > 0; ones = !ones) {
      const int64_t run = in.ended() ? left : std::min(left, in.between(0, 3 * height));
      mask_runs.push_back(static_cast<int32_t>(run));
      left -= run;
    }
    mask_start.push_back(static_cast<int64_t>(mask_runs.size()));
    mask_size.insert(mask_size.end(), {static_cast<int32_t>(height), static_cast<int32_t>(width)});
  }

  int64_t masks() const { return static_cast<int64_t>(mask_start.size()) - 1; }
};

template <class T>
void disturb(Input& in, std::vector<T>& numbers) {
  if (in.one_in(4) && !numbers.empty()) numbers[in.below(static_cast<int64_t>(numbers.size()))] = in.number<T>();
}

struct Weights {
  std::vector<uint32_t> value;

  explicit Weights(Input& in) {
    const int64_t radius = in.one_in(8) ? in.below(scf::kMaxBlurRadius + 1) : in.below(10);
    value.assign(radius + 1, radius == 0 ? 0 : (1 << 23) / static_cast<uint32_t>(radius + 1));
    value[0] = (1 << 24) - 2 * static_cast<uint32_t>(radius) * (radius == 0 ? 0 : value[radius]);
  }
};

constexpr double kSigmas[] = {1e-300, 1e-45, 1e-30, 0.1, 100, 1e30, 1e300};

void render_scene(Input& in, Scene& scene, std::vector<int32_t>& plan, int64_t size, bool must_be_valid) {
  const auto views = static_cast<int64_t>(plan.size()) / scf::kPlanWidth;
  std::vector<float> augment;
  for (int64_t v = 0; v < views; ++v) {
    const bool plain = in.one_in(2);
    for (const float one : {1.0f, 1.0f, 1.0f, 0.0f, 0.0f}) {
      augment.push_back(plain ? one : in.one_in(16) ? in.number<float>() : one + in.number<int8_t>() / 64.0f);
    }
  }
  const Weights weights(in);
  const bool published = in.one_in(2), channels_last = in.one_in(2);
  const auto type = static_cast<scf::PixelType>(in.below(3));
  std::vector<uint8_t> out(views * 3 * size * size * (type == scf::PixelType::kFloat ? 4 : 2));
  const scf::RenderProblem problem{
      .images = scene.images.data(),
      .plan = plan.data(),
      .augment = augment.data(),
      .mask_runs = scene.mask_runs.data(),
      .mask_start = scene.mask_start.data(),
      .image_count = static_cast<int64_t>(scene.images.size()),
      .mask_count = scene.masks(),
      .views = views,
      .size = size,
      .mean = {0.5f, 0.4f, 0.3f},
      .std = {0.2f, 0.3f, 0.4f},
      .region = {scf::falloff_of(kSigmas[in.below(std::size(kSigmas))]), weights.value.data(),
                 static_cast<int64_t>(weights.value.size()) - 1, published},
      .type = type,
      .channels_last = channels_last,
      .out = out.data(),
  };
  const std::string error = scf::RenderChecker(problem, static_cast<int64_t>(scene.mask_runs.size())).error();
  if (!error.empty()) {
    const bool large = error.find("expected at most 2^22") != std::string::npos;  // this limit is the renderer's alone
    require(!must_be_valid || large || error.find("augment") != std::string::npos, error.c_str());
    return;
  }
  const scf::RenderJobs jobs = scf::RenderPlanner(problem).plan();  // of the backend "cuda"
  require(static_cast<int64_t>(jobs.views.size()) == views && jobs.scratch_bytes >= 0, "views: wrong tables");
  std::vector<uint8_t> tables(jobs.table_bytes());
  jobs.write_tables(tables.data());
  int64_t work = 0;
  for (int64_t v = 0; v < views; ++v) {
    const int32_t* row = plan.data() + v * scf::kPlanWidth;
    work += (row[scf::kX2] - row[scf::kX1]) + int64_t{row[scf::kY2]} - row[scf::kY1];
  }
  if (work < 1 << 14) scf::render_views_cpu(problem, in_parts);
}

void render(const uint8_t* data, size_t size) {
  Input in(data, size);
  Scene scene(in);
  const int64_t side = in.one_in(6) ? in.between(1, 100) : in.between(1, 20);
  std::vector<int32_t> plan;
  for (int64_t v = in.below(6); v > 0; --v) {
    const int64_t image = in.below(static_cast<int64_t>(scene.images.size()));
    const auto height = static_cast<int32_t>(scene.images[image].height);
    const auto width = static_cast<int32_t>(scene.images[image].width);
    const auto x1 = static_cast<int32_t>(in.between(-8, width - 1)),
               y1 = static_cast<int32_t>(in.between(-8, height - 1));
    const auto x2 = static_cast<int32_t>(in.between(std::max(x1, 0) + 1, width + 8));
    const auto y2 = static_cast<int32_t>(in.between(std::max(y1, 0) + 1, height + 8));
    const auto left = static_cast<int32_t>(in.below(9)), top = static_cast<int32_t>(in.below(9));
    const auto wide = static_cast<int32_t>(side + left + in.below(9)),
               high = static_cast<int32_t>(side + top + in.below(9));
    std::vector<int32_t> row = {
        static_cast<int32_t>(in.below(4)), static_cast<int32_t>(image), x1, y1, x2, y2, wide, high, left, top};
    for (int k = 0; k < 4; ++k) row.push_back(static_cast<int32_t>(in.between(-4, 44)));
    for (int k = 0; k < 2; ++k) row.push_back(static_cast<int32_t>(in.below(scene.masks())));
    disturb(in, row);
    plan.insert(plan.end(), row.begin(), row.end());
  }
  disturb(in, scene.mask_runs);
  disturb(in, scene.mask_start);
  render_scene(in, scene, plan, side, false);
}

// Lowers views as the host module does; the renderer must accept the plan.
void lower(const uint8_t* data, size_t bytes) {
  Input in(data, bytes);
  Scene scene(in);
  const int64_t views = in.below(5);
  int64_t size = in.between(1, 40);
  std::vector<int32_t> kind, source;
  std::vector<int64_t> image, mask;
  std::vector<uint8_t> stretch;
  std::vector<double> box;
  for (int64_t v = 0; v < views; ++v) {
    kind.push_back(static_cast<int32_t>(in.below(4)));
    image.push_back(in.below(static_cast<int64_t>(scene.images.size())));
    stretch.push_back(in.number<uint8_t>());
    const scf::Image& of = scene.images[image.back()];
    for (const int64_t number : {int64_t{0}, int64_t{0}, of.width, of.height}) {
      source.push_back(static_cast<int32_t>(number + in.between(-3, 3)));
      box.push_back(static_cast<double>(number) + in.number<int8_t>() / 16.0);
    }
    for (int k = 0; k < 2; ++k) mask.push_back(in.between(-1, scene.masks() - 1));
  }
  disturb(in, kind), disturb(in, source), disturb(in, image), disturb(in, mask), disturb(in, box);
  disturb(in, scene.mask_runs), disturb(in, scene.mask_start), disturb(in, scene.mask_size);
  if (in.one_in(16)) size = in.number<int64_t>();
  const scf::ViewArrays arrays{
      .kind = kind.data(),
      .image = image.data(),
      .source = source.data(),
      .stretch = stretch.data(),
      .box = box.data(),
      .mask = mask.data(),
      .mask_runs = scene.mask_runs.data(),
      .mask_start = scene.mask_start.data(),
      .mask_size = scene.mask_size.data(),
      .shape = scene.shapes.data(),
      .views = views,
      .runs = static_cast<int64_t>(scene.mask_runs.size()),
      .masks = scene.masks(),
      .images = static_cast<int64_t>(scene.images.size()),
  };
  std::vector<int32_t> plan(views * scf::kPlanWidth);
  if (scf::ViewLowering(arrays, size).lower(plan.data()) && size <= 64) render_scene(in, scene, plan, size, true);
}

void region(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t height = in.between(1, 40), width = in.between(1, 40);
  std::vector<uint8_t> image(height * width * 3), masks[2], out(image.size());
  for (uint8_t& value : image) value = in.number<uint8_t>();
  for (auto& mask : masks) {
    mask.resize(height * width);
    for (uint8_t& value : mask) value = in.one_in(3) ? in.number<uint8_t>() : 0;
    mask[in.below(height * width)] = 255;
  }
  const Weights weights(in);
  const double sigma = kSigmas[in.below(std::size(kSigmas))];
  scf::focused_region_cpu({.image = {image.data(), height, width},
                           .subject_mask = masks[0].data(),
                           .object_mask = masks[1].data(),
                           .region = {scf::falloff_of(sigma), weights.value.data(),
                                      static_cast<int64_t>(weights.value.size()) - 1, in.one_in(2)},
                           .out = out.data()},
                          in_parts);
}

template <class T>
std::vector<T> numbers(Input& in, int64_t count) {
  std::vector<T> found(count);
  for (T& value : found)
    value = in.one_in(16) ? static_cast<T>(in.number<float>()) : static_cast<T>(in.number<int8_t>() / 16.0);
  return found;
}

void contrastive(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t rows = in.between(0, 70), texts = in.between(0, 40), first_row = in.below(5), first_text = in.below(5);
  const int64_t n = rows + first_row + in.below(3), u = texts + first_text + in.below(3), stride = texts + in.below(3);
  const auto by_row = numbers<float>(in, n), by_text = numbers<float>(in, u), weight = numbers<float>(in, u);
  std::vector<int64_t> index(n);
  for (int64_t& text : index) text = u > 0 ? in.below(u) : 0;
  const scf::ContrastiveTile tile{first_row, first_text, rows, texts, in.one_in(2) || u == 0 ? nullptr : index.data()};
  const scf::ContrastiveLogits logits{by_row.data(), by_text.data(), in.number<int8_t>() / 4.0f,
                                      in.number<int8_t>() / 4.0f};
  auto values = numbers<float>(in, rows > 0 ? (rows - 1) * stride + texts : 0);
  std::vector<double> row_sum(n), col_sum(u), positive(n);
  scf::contrastive_exponentials_cpu(tile, logits, weight.data(), values.data(), stride, row_sum.data(), col_sum.data(),
                                    positive.data(), in_parts);
  const auto grad_row = numbers<double>(in, n), grad_col = numbers<double>(in, u), grad_logit = numbers<double>(in, n);
  std::vector<float> factors(3 * (n + u)), out(values.size());
  float* columns = factors.data() + 3 * n;
  const scf::ContrastiveFactors parts{factors.data(), factors.data() + n, factors.data() + 2 * n,
                                      columns,        columns + u,        columns + 2 * u};
  double magnitude = 0;
  scf::contrastive_factors_cpu({row_sum.data(), col_sum.data(), grad_row.data(), grad_col.data(), grad_logit.data()},
                               logits, weight.data(), n, u, parts, magnitude, in_parts);
  for (const bool kept : {true, false}) {
    scf::contrastive_gradients_cpu(tile, logits, parts, kept, values.data(), stride, out.data(), stride, in_parts);
  }
  const auto x = numbers<float>(in, rows * texts);
  std::vector<float> inverse(rows), d(x);
  scf::contrastive_inverse_cpu(x.data(), rows, texts, inverse.data(), in_parts);
  scf::contrastive_finish_cpu(x.data(), inverse.data(), 2, in.one_in(2), rows, texts, d.data(), in_parts);
}

void distillation(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t students = in.between(0, 20), teachers = in.between(0, 20), width = in.between(0, 40);
  const int64_t pairs = students > 0 && teachers > 0 ? in.below(40) : 0;
  const auto student = numbers<float>(in, students * width), teacher = numbers<float>(in, teachers * width);
  const auto weight = numbers<float>(in, pairs);
  std::vector<int64_t> student_index(pairs), teacher_index(pairs);
  for (int64_t& row : student_index) row = in.below(students);
  for (int64_t& row : teacher_index) row = in.below(teachers);
  float loss = 0, d_temperature = 0;
  std::vector<float> d_student(students * width);
  scf::DistillationProblem problem{
      .student = student.data(),
      .teacher = teacher.data(),
      .student_index = student_index.data(),
      .teacher_index = teacher_index.data(),
      .weight = weight.data(),
      .student_temperature = nullptr,
      .student_temperature_value = 0.07f,
      .teacher_temperature = 0.07f,
      .students = students,
      .teachers = teachers,
      .pairs = pairs,
      .width = width,
      .loss = &loss,
      .d_student = in.one_in(2) ? d_student.data() : nullptr,
      .d_temperature = &d_temperature,
      .scratch = nullptr,
  };
  std::vector<float> scratch(scf::distillation_scratch(problem, false));
  std::vector<int64_t> order(students + 1 + pairs);
  problem.scratch = scratch.data(), problem.order = order.data();
  scf::distillation_forward_cpu(problem, in_parts);
}

void layers(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t rows = in.between(0, 140), width = in.between(0, 40), sums = in.below(3);
  const auto x = numbers<float>(in, rows * width), branch = numbers<float>(in, rows * width);
  const auto weight = numbers<float>(in, width), bias = numbers<float>(in, width);
  std::vector<float> total(x.size()), out(x.size()), statistics(2 * rows), gradient(width);
  scf::add_layer_norm_forward_cpu<float, float>({x.data(), branch.data(), weight.data(), bias.data(), bias.data(),
                                                 total.data(), out.data(), statistics.data(), rows, width, 1e-5f},
                                                in_parts);
  const int64_t count = sums == 0 ? 0 : sums + 1;
  std::vector<float> parts(scf::add_layer_norm_parts(rows) * count * width), d_sums(count * width);
  scf::add_layer_norm_backward_cpu<float, float>({x.data(), out.data(), total.data(), weight.data(), statistics.data(),
                                                  total.data(), parts.data(), d_sums.data(), rows, width, count},
                                                 in_parts);
  std::vector<scf::BFloat16> half(x.size()), half_out(x.size());
  for (size_t k = 0; k < x.size(); ++k) half[k] = scf::from_float<scf::BFloat16>(x[k]);
  scf::quick_gelu_forward_cpu(half.data(), half_out.data(), static_cast<int64_t>(half.size()), in_parts);
  std::vector<float> gelu_parts(scf::quick_gelu_parts(rows) * width);
  scf::quick_gelu_bias_backward_cpu<scf::BFloat16>(
      {half.data(), half.data(), bias.data(), half_out.data(), gelu_parts.data(), gradient.data(), rows, width},
      in_parts);
}

// A heap overflow behind a comparison, with which the tests check that failures are found, kept and reproduced.
void selftest(const uint8_t* data, size_t size) {
  std::vector<uint8_t> memory(4);
  if (size > 2 && data[0] == 'b' && data[1] == 'u' && data[2] == 'g') memory.data()[size + 1] = 1;
}

}  // namespace

const std::vector<fuzz::Target> fuzz::targets = {
    {"rle", rle, 400, false},
    {"segments", segments, 700, false},
    {"jpeg", jpeg, 4000, false},
    {"lower", lower, 600, false},
    {"render", render, 600, false},
    {"region", region, 12000, false},
    {"contrastive", contrastive, 4000, false},
    {"distillation", distillation, 3000, false},
    {"layers", layers, 4000, false},
    {"selftest", selftest, 64, true},
};
