#include "dali/montage.h"

#include "dali/cpu/tile.h"
#include "dali/pipeline/util/thread_pool.h"

namespace mcl::montage {
namespace {

template <typename T>
using Values = std::array<T, 3 * 256>;

class MontageCpu : public Montage<dali::CPUBackend> {
 public:
  explicit MontageCpu(const dali::OpSpec& spec) : Montage(spec), workers_(num_threads_) {}

 protected:
  void RunImpl(dali::Workspace& ws) override {
    for_type([&](auto zero) { run<decltype(zero)>(ws); });
  }

 private:
  // Scratch of one thread.
  struct Worker {
    cpu::Copies copies;
    cpu::Tile tile;
  };
  std::vector<Worker> workers_;

  template <typename T>
  void run(dali::Workspace& ws) {
    const auto& images = ws.Input<dali::CPUBackend>(0);
    const Values<T> values = this->template values<T>();
    std::vector<T*> canvases;  // of each view
    for (int view = 0; view < views_; ++view) {
      auto& output = ws.Output<dali::CPUBackend>(view);
      DALI_ENFORCE(output.IsContiguous(), "montage: the output is not contiguous");
      output.SetLayout("HWC");
      canvases.push_back(output.template mutable_tensor<T>(0));
    }
    auto& pool = ws.GetThreadPool();
    for (int i = 0; i < images_; ++i)
      pool.AddWork([&, i](int thread) { make_tiles<T>(ws, i, values, canvases, workers_[thread]); },
                   images.shape()[i].num_elements());
    pool.RunAll();
  }

  // Makes all tiles of one image and writes them into their canvases.
  template <typename T>
  void make_tiles(const dali::Workspace& ws, int i, const Values<T>& values, const std::vector<T*>& canvases,
                  Worker& worker) const {
    const auto& images = ws.Input<dali::CPUBackend>(0);
    const auto shape = images.shape()[i];
    const int height = static_cast<int>(shape[0]), width = static_cast<int>(shape[1]);
    worker.copies.reset({images.template tensor<uint8_t>(i), height, width});
    cpu::Tile& tile = worker.tile;
    const float* recipe = ws.Input<dali::CPUBackend>(1).template tensor<float>(i);
    const int* slots = ws.Input<dali::CPUBackend>(2).template tensor<int>(i);
    for (int view = 0; view < views_; ++view) {
      for (const Level& level : levels_) {
        const int step = released_ ? level.ratio : 1;
        tile.make(worker.copies, read_recipe(recipe, height, width), tile_of(level) * step);
        recipe += kFields;
        for (int s = 0; s < level.slots; ++s)
          place(tile, tile_of(level), step, values, canvases[view] + 3 * corner_of(level, *slots++));
      }
    }
  }

  template <typename T>
  void place(cpu::Tile& tile, int size, int step, const Values<T>& values, T* corner) const {
    for (int y = 0; y < size; ++y) {
      T* to = corner + static_cast<int64_t>(y) * side_ * 3;
      const size_t from = static_cast<size_t>(y) * step * tile.size;
      const uint8_t *red = tile.plane(0) + from, *green = tile.plane(1) + from, *blue = tile.plane(2) + from;
      for (int x = 0; x < size; ++x, to += 3) {
        to[0] = values[red[x * step]];
        to[1] = values[256 + green[x * step]];
        to[2] = values[512 + blue[x * step]];
      }
    }
  }
};

}  // namespace
}  // namespace mcl::montage

DALI_SCHEMA(mcl__Montage)
    .DocStr("Makes the tiles of every view and level from decoded images, and places them on canvases.")
    .NumInput(3)
    .InputDox(0, "images", "TensorList of uint8", "(height, width, 3), RGB")
    .InputDox(1, "recipes", "TensorList of float32", "(views * levels, 17): see kernels/dali/recipe.h; on the CPU")
    .InputDox(2, "slots", "TensorList of int32", "(views * tiles of one image): its slots, level by level; on the CPU")
    .InputDevice(1, 3, dali::InputDevice::CPU)
    .OutputFn([](const dali::OpSpec& spec) { return spec.GetArgument<int>("views"); })
    .AddArg("cells", "Feature cells per tile side; a canvas is 32 * cells pixels square. One number for all images.",
            DALI_INT32, true)
    .AddArg("ratios", "Tiles per canvas side, per level.", DALI_INT_VEC)
    .AddArg("images_per_canvas", "Images per canvas, per level.", DALI_INT_VEC)
    .AddArg("views", "Number of views.", DALI_INT32)
    .AddArg("mean", "Mean of red, green and blue, in levels.", DALI_FLOAT_VEC)
    .AddArg("std", "Standard deviation of red, green and blue, in levels.", DALI_FLOAT_VEC)
    .AddOptionalArg("released", "Make tiles at canvas size and take every ratio-th pixel.", false)
    .AddOptionalTypeArg("dtype", "FLOAT or FLOAT16: normalised values; UINT8: levels.", DALI_FLOAT);

DALI_REGISTER_OPERATOR(mcl__Montage, ::mcl::montage::MontageCpu, dali::CPU);
