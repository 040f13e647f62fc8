// scenarioclip_fast._native.host: work on Python and NumPy objects, without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "jpeg.h"
#include "jpeg_scan.h"
#include "rle.h"
#include "segments.h"
#include "views.h"

namespace py = pybind11;

namespace {

template <class T>
using Dense = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Runs = Dense<int64_t>;

std::string rle_compress(const Runs& runs) { return scf::rle_compress(runs.data(), runs.size()); }

py::array_t<int64_t> rle_decompress(const py::bytes& counts) {
  const std::string_view text = counts;
  // A number takes at least one character, so the length of the text bounds the allocation.
  py::array_t<int64_t> runs(static_cast<py::ssize_t>(scf::rle_count(text)));
  scf::rle_decompress(text, runs.mutable_data());
  return runs;
}

// A COCO string and a box for each of the distinct ids, or None for an id without pixels.
py::list segment_masks(const Dense<uint8_t>& pixels, const std::vector<int64_t>& ids) {
  if (pixels.ndim() != 3 || pixels.shape(2) != 3) {
    throw std::invalid_argument("got pixels of another shape, expected [height, width, 3]");
  }
  std::vector<scf::Segment> segments;
  std::vector<std::string> texts(ids.size());
  {
    const py::gil_scoped_release release;
    segments = scf::find_segments(pixels.data(), pixels.shape(0), pixels.shape(1), ids);
    for (size_t k = 0; k < ids.size(); ++k) {
      const std::vector<int64_t>& runs = segments[k].runs;
      if (!segments[k].empty()) texts[k] = scf::rle_compress(runs.data(), static_cast<int64_t>(runs.size()));
    }
  }
  py::list found;
  for (size_t k = 0; k < ids.size(); ++k) {
    const auto& box = segments[k].box;
    if (segments[k].empty()) {
      found.append(py::none());
    } else {
      found.append(py::make_tuple(texts[k], py::make_tuple(box[0], box[1], box[2], box[3])));
    }
  }
  return found;
}

py::object jpeg_header(const py::bytes& data) {
  const auto header = scf::jpeg_header(static_cast<std::string_view>(data));
  if (!header) return py::none();
  return py::make_tuple(header->height, header->width, header->components);
}

py::object jpeg_damage(const py::bytes& data) {
  const std::string_view bytes = data;
  std::optional<std::string> damage;
  {
    const py::gil_scoped_release release;
    damage = scf::JpegScans(bytes).damage();
  }
  if (!damage) return py::none();
  return py::str(*damage);
}

// The run lengths of RLE masks of the given sizes: (int32 [R], int64 [M + 1]). None if a mask is not a dict with the
// size that belongs to it and the COCO string of a mask with at least one pixel.
py::object mask_table(const py::list& masks, const Dense<int64_t>& sizes) {
  const py::str size_key("size"), counts_key("counts");
  if (sizes.ndim() != 2 || sizes.shape(0) != static_cast<py::ssize_t>(masks.size()) || sizes.shape(1) != 2) {
    throw std::invalid_argument("got sizes of another shape, expected [masks, 2]");
  }
  const auto is_number = [](PyObject* object, int64_t number) {
    int overflow = 0;
    return PyLong_CheckExact(object) && PyLong_AsLongLongAndOverflow(object, &overflow) == number && overflow == 0;
  };
  std::vector<std::string_view> texts;
  std::vector<py::object> owners;  // keep the texts alive if another thread changes a mask meanwhile
  // The value of a key; a null pointer without it. Comparing keys may run any code, so that nothing is only borrowed.
  const auto value_of = [](const py::object& mask, const py::str& key) {
    PyObject* value = PyDict_GetItemWithError(mask.ptr(), key.ptr());
    if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return py::reinterpret_borrow<py::object>(value);
  };
  for (py::size_t m = 0; m < masks.size(); ++m) {
    if (static_cast<py::ssize_t>(m) >= sizes.shape(0)) return py::none();  // the list has grown
    const auto mask = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(masks.ptr(), static_cast<py::ssize_t>(m)));
    if (!PyDict_CheckExact(mask.ptr())) return py::none();
    const py::object size = value_of(mask, size_key), counts_object = value_of(mask, counts_key);
    PyObject* counts = counts_object.ptr();
    if (!size || !counts_object) return py::none();
    if (!(PyList_CheckExact(size.ptr()) || PyTuple_CheckExact(size.ptr())) ||
        PySequence_Fast_GET_SIZE(size.ptr()) != 2) {
      return py::none();
    }
    const int64_t* expected = sizes.data(static_cast<py::ssize_t>(m));
    for (int side = 0; side < 2; ++side) {
      if (!is_number(PySequence_Fast_GET_ITEM(size.ptr(), side), expected[side])) {
        return py::none();
      }
    }
    owners.push_back(counts_object);
    if (PyBytes_CheckExact(counts)) {
      texts.emplace_back(PyBytes_AS_STRING(counts), static_cast<size_t>(PyBytes_GET_SIZE(counts)));
    } else if (PyUnicode_CheckExact(counts) && PyUnicode_IS_ASCII(counts)) {
      texts.emplace_back(static_cast<const char*>(PyUnicode_DATA(counts)),
                         static_cast<size_t>(PyUnicode_GET_LENGTH(counts)));
    } else {
      return py::none();
    }
  }
  scf::MaskDecoder decoder;
  py::array_t<int64_t> start(static_cast<py::ssize_t>(texts.size()) + 1);
  int64_t* first = start.mutable_data();
  first[0] = 0;
  for (size_t m = 0; m < texts.size(); ++m) {
    const std::optional<int64_t> count = decoder.count(texts[m]);
    if (!count) return py::none();
    first[m + 1] = first[m] + *count;
  }
  py::array_t<int32_t> runs(first[texts.size()]);
  int32_t* to = runs.mutable_data();
  const int64_t* size = sizes.data();
  bool valid = true;
  {
    const py::gil_scoped_release release;
    for (size_t m = 0; valid && m < texts.size(); ++m) {
      const int64_t height = size[2 * m], width = size[2 * m + 1];
      valid = height > 0 && width > 0 && height <= scf::kMaxRun && width <= scf::kMaxRun / height &&
              decoder.decode(texts[m], height * width, to + first[m]);
    }
  }
  if (!valid) return py::none();
  return py::make_tuple(runs, start);
}

// The plan of a batch of views, int32 [V, 16]; None if a view is invalid. `shapes`: those of the images.
py::object lower_views(const Dense<int32_t>& kind, const Dense<int64_t>& image, const Dense<int32_t>& source,
                       const Dense<bool>& stretch, const Dense<double>& box, const Dense<int64_t>& mask,
                       const Dense<int32_t>& mask_runs, const Dense<int64_t>& mask_start,
                       const Dense<int32_t>& mask_size, const py::list& shapes, int64_t size) {
  const py::ssize_t views = kind.size(), masks = mask_start.size() - 1;
  if (image.size() != views || source.size() != 4 * views || stretch.size() != views || box.size() != 4 * views ||
      mask.size() != 2 * views || masks < 0 || mask_size.size() != 2 * masks) {
    throw std::invalid_argument("got arrays of different lengths, expected those of a ViewBatch");
  }
  std::vector<int64_t> sides;
  for (const py::handle shape : shapes) {
    if (!PyTuple_Check(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) != 3) return py::none();
    int64_t side[3];
    for (int k = 0; k < 3; ++k) {
      PyObject* number = PyTuple_GET_ITEM(shape.ptr(), k);
      if (!PyLong_Check(number)) return py::none();  // converting it may run any code
      side[k] = PyLong_AsLongLong(number);
    }
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (side[0] < 1 || side[1] < 1 || side[2] != 3) return py::none();
    sides.insert(sides.end(), side, side + 2);
  }
  const scf::ViewArrays arrays{
      .kind = kind.data(),
      .image = image.data(),
      .source = source.data(),
      .stretch = reinterpret_cast<const uint8_t*>(stretch.data()),
      .box = box.data(),
      .mask = mask.data(),
      .mask_runs = mask_runs.data(),
      .mask_start = mask_start.data(),
      .mask_size = mask_size.data(),
      .shape = sides.data(),
      .views = views,
      .runs = mask_runs.size(),
      .masks = masks,
      .images = static_cast<int64_t>(shapes.size()),
  };
  py::array_t<int32_t> plan({views, py::ssize_t{16}});
  int32_t* rows = plan.mutable_data();
  bool valid;
  {
    const py::gil_scoped_release release;
    valid = scf::ViewLowering(arrays, size).lower(rows);
  }
  if (!valid) return py::none();
  return plan;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["standard"] = static_cast<int64_t>(__cplusplus);
#ifdef __AVX2__
  info["avx2"] = true;
#else
  info["avx2"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(host, m) {
  m.doc() = "COCO run-length codec, JPEG header and damage, plans of views, build info.";
  m.def("rle_compress", &rle_compress, py::arg("runs"), "Encode run lengths, int64 [n], as COCO's string.");
  m.def("rle_decompress", &rle_decompress, py::arg("counts"),
        "Decode COCO's string to run lengths; ValueError if malformed.");
  m.def(
      "segment_masks", &segment_masks, py::arg("pixels"), py::arg("ids"),
      "(COCO's string, (x1, y1, x2, y2)) of each of the distinct ids in a panoptic image, uint8 [H, W, 3]; None for an "
      "id without pixels.");
  m.def("mask_table", &mask_table, py::arg("masks"), py::arg("sizes"),
        "(run lengths, where those of each mask begin) of RLE masks, int32 [R] and int64 [M + 1]; None if one is "
        "unusual or invalid.");
  m.def("lower_views", &lower_views, py::arg("kind"), py::arg("image"), py::arg("source"), py::arg("stretch"),
        py::arg("box"), py::arg("mask"), py::arg("mask_runs"), py::arg("mask_start"), py::arg("mask_size"),
        py::arg("shapes"), py::arg("size"), "The plan of views, int32 [V, 16]; None if one is invalid.");
  m.def("jpeg_header", &jpeg_header, py::arg("data"), "(height, width, components) as stored, EXIF ignored, or None.");
  m.def("jpeg_damage", &jpeg_damage, py::arg("data"),
        "The damage of a JPEG's entropy-coded data, empty if it is sound; None if its coding is not checked.");
  m.def("build_info", &build_info, "The compiler, the C++ standard and whether AVX2 is used.");
}
