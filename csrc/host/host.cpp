// scenarioclip_fast._native.host: work on Python and NumPy objects, without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "jpeg.h"
#include "rle.h"

namespace py = pybind11;

namespace {

using Runs = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

std::string rle_compress(const Runs& runs) { return scf::rle_compress(runs.data(), runs.size()); }

py::array_t<int64_t> rle_decompress(const py::bytes& counts) {
  const std::string_view text = counts;
  // A number takes at least one character, so the length of the text bounds the allocation.
  py::array_t<int64_t> runs(static_cast<py::ssize_t>(scf::rle_count(text)));
  scf::rle_decompress(text, runs.mutable_data());
  return runs;
}

py::object jpeg_header(const py::bytes& data) {
  const auto header = scf::jpeg_header(static_cast<std::string_view>(data));
  if (!header) return py::none();
  return py::make_tuple(header->height, header->width, header->components);
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
  m.doc() = "COCO run-length codec, JPEG header probe, build info.";
  m.def("rle_compress", &rle_compress, py::arg("runs"), "Encode run lengths, int64 [n], as COCO's string.");
  m.def("rle_decompress", &rle_decompress, py::arg("counts"),
        "Decode COCO's string to run lengths; ValueError if malformed.");
  m.def("jpeg_header", &jpeg_header, py::arg("data"), "(height, width, components) as stored, EXIF ignored, or None.");
  m.def("build_info", &build_info, "The compiler, the C++ standard and whether AVX2 is used.");
}
