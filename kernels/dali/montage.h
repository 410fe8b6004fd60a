// The DALI operator `mcl.montage`: takes decoded images and their recipes, and returns the canvases of every view.
//
// A view has K canvases for N images, but all samples of a DALI pipeline form batches of one size. So a view is
// returned as N samples of K * S / N rows each, S being the canvas side in pixels. Samples are contiguous in memory, so
// that the output (N, K * S / N, S, 3) is the canvases (K, S, S, 3), level after level.
#pragma once

#include <array>
#include <type_traits>
#include <vector>

#include "dali/core/error_handling.h"
#include "dali/core/float16.h"
#include "dali/pipeline/operator/common.h"
#include "dali/pipeline/operator/operator.h"
#include "dali/recipe.h"

namespace mcl::montage {

// One level; all views have the same levels.
struct Level {
  int ratio;       // tiles per canvas side
  int per_canvas;  // images per canvas
  int slots;       // tile slots per image
  int first_slot;  // number of its first slot among an image's slots in a view
};

// What CPU and GPU share: arguments, shapes, checks, and the positions of tiles.
template <typename Backend>
class Montage : public dali::Operator<Backend> {
 public:
  explicit Montage(const dali::OpSpec& spec)
      : dali::Operator<Backend>(spec),
        views_(spec.GetArgument<int>("views")),
        released_(spec.GetArgument<bool>("released")),
        mean_(spec.GetRepeatedArgument<float>("mean")),
        std_(spec.GetRepeatedArgument<float>("std")),
        dtype_(spec.GetArgument<dali::DALIDataType>("dtype")) {
    const auto ratios = spec.GetRepeatedArgument<int>("ratios");
    const auto per_canvas = spec.GetRepeatedArgument<int>("images_per_canvas");
    DALI_ENFORCE(ratios.size() == per_canvas.size(), "montage: ratios and images_per_canvas differ in length");
    DALI_ENFORCE(mean_.size() == 3 && std_.size() == 3, "montage: mean and std must have three values");
    for (size_t i = 0; i < ratios.size(); ++i) {
      const int tiles = ratios[i] * ratios[i], k = per_canvas[i];
      DALI_ENFORCE(ratios[i] > 0 && k > 0 && tiles % k == 0,
                   "montage: images_per_canvas must divide the tiles of a canvas");
      levels_.push_back({ratios[i], k, tiles / k, slots_});
      slots_ += tiles / k;
    }
  }

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& outputs, const dali::Workspace& ws) override {
    images_ = ws.GetInputBatchSize(0);
    DALI_ENFORCE(ws.GetInputDataType(0) == DALI_UINT8, "montage: images must be uint8");
    DALI_ENFORCE(ws.GetInputDataType(1) == DALI_FLOAT, "montage: recipes must be float32");
    DALI_ENFORCE(ws.GetInputDataType(2) == DALI_INT32, "montage: slots must be int32");
    const auto &pixels = ws.GetInputShape(0), &recipes = ws.GetInputShape(1), &slots = ws.GetInputShape(2);
    const int tiles = views_ * static_cast<int>(levels_.size());
    for (int i = 0; i < images_; ++i) {
      DALI_ENFORCE(pixels.sample_dim() == 3 && pixels[i][2] == 3 && pixels[i].num_elements() > 0,
                   "montage: images must be (height, width, 3)");
      DALI_ENFORCE(recipes[i].num_elements() == tiles * kFields, "montage: recipes must be (views * levels, 17)");
      DALI_ENFORCE(slots[i].num_elements() == views_ * slots_, "montage: slots must name all tiles of the image");
    }
    std::vector<int> cells;
    dali::GetPerSampleArgument(cells, "cells", this->spec_, ws, images_);
    side_ = 32 * cells[0];
    int rows = 0;
    for (const int c : cells) DALI_ENFORCE(c == cells[0] && c > 0, "montage: cells must be one positive number");
    for (const Level& level : levels_) {
      DALI_ENFORCE(side_ % level.ratio == 0 && side_ % level.per_canvas == 0 && images_ % level.per_canvas == 0,
                   "montage: tiles and images must fill whole canvases");
      rows += side_ / level.per_canvas;
    }
    outputs.assign(views_, {dali::uniform_list_shape(images_, dali::TensorShape<>{rows, side_, 3}), dtype_});
    return true;
  }

  int tile_of(const Level& level) const { return side_ / level.ratio; }

  // Offset of a tile slot's first pixel from the first pixel of the view, in pixels. Rows are `side_` pixels apart.
  int64_t corner_of(const Level& level, int slot) const {
    DALI_ENFORCE(slot >= 0 && slot < images_ * level.slots, "montage: a slot is out of range");
    const int tiles = level.ratio * level.ratio, row = slot % tiles / level.ratio, column = slot % level.ratio;
    int64_t canvas = slot / tiles;
    for (const Level* before = levels_.data(); before != &level; ++before) canvas += images_ / before->per_canvas;
    return (canvas * side_ + row * tile_of(level)) * side_ + column * tile_of(level);
  }

  // Calls run(T()), T being the type of the output.
  template <typename Run>
  void for_type(const Run& run) const {
    switch (dtype_) {
      case DALI_FLOAT:
        return run(float());
      case DALI_FLOAT16:
        return run(dali::float16());
      case DALI_UINT8:
        return run(uint8_t());
      default:
        DALI_FAIL("montage: dtype must be FLOAT, FLOAT16 or UINT8");
    }
  }

  // The output value of each of the 256 levels, per channel.
  template <typename T>
  std::array<T, 3 * 256> values() const {
    std::array<T, 3 * 256> values;
    for (int i = 0; i < 3 * 256; ++i) {
      const int channel = i / 256, level = i % 256;
      if constexpr (std::is_same_v<T, uint8_t>) {
        values[i] = static_cast<T>(level);
      } else {
        values[i] = static_cast<T>((static_cast<float>(level) - mean_[channel]) / std_[channel]);
      }
    }
    return values;
  }

  int views_, slots_ = 0;
  bool released_;  // tiles are made at canvas size, then every ratio-th pixel is taken
  std::vector<float> mean_, std_;
  dali::DALIDataType dtype_;
  std::vector<Level> levels_;
  int images_ = 0, side_ = 0;  // of this batch
};

}  // namespace mcl::montage
