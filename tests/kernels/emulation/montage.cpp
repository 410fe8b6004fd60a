// Compares the CUDA kernels of mcl.montage, emulated on the CPU, with the CPU's tiles, and the rescaling of these with
// plain loops. Also runs the kernels of both devices with numbers that no plan contains.
#include "cuda_emulation.h"

#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "dali/cpu/tile.h"
#include "dali/cuda/montage.cuh"

namespace {

using namespace mcl::montage;

constexpr int kBlock = 64;
constexpr int kMargin = 3;  // pixels of a canvas around its tiles

// An image in memory of exactly its size.
struct Picture {
  int height, width;
  std::vector<uint8_t> pixels;

  Picture(int height, int width, check::Random& draw) : height(height), width(width), pixels(3 * height * width) {
    for (size_t i = 0; i < pixels.size(); ++i) {
      // A ramp with noise, and white and black parts.
      const double x = 128 + 150 * draw() + 100 * std::sin(0.01 * static_cast<double>(i));
      pixels[i] = static_cast<uint8_t>(std::clamp(x, 0.0, 255.0));
    }
  }
};

using Levels = std::vector<int>;  // (shown, shown, RGB)

// A requested tile: `side` pixels, of which every step-th is shown, in `slots` slots.
struct Wish {
  const Picture* picture;
  std::vector<float> fields;
  int side, step, slots;

  Recipe recipe() const { return read_recipe(fields.data(), picture->height, picture->width); }
  int shown() const { return side / step; }
};

// A value that identifies channel and level.
template <typename T>
T value_of(int channel, int level) {
  if constexpr (sizeof(T) == 1) {
    return static_cast<T>(level);
  } else if constexpr (sizeof(T) == 2) {
    return static_cast<T>(256 * channel + level);
  } else {
    return (static_cast<T>(level) - 120 - channel) / 58;
  }
}

// Levels in `canvas` from the top left of a tile; 1000 if a value belongs to no level of its channel.
template <typename T>
Levels levels_in(const T* corner, int canvas, int shown) {
  Levels levels;
  for (int y = 0; y < shown; ++y) {
    for (int i = 0; i < 3 * shown; ++i) {
      int level = 0;
      while (level < 256 && value_of<T>(i % 3, level) != corner[y * canvas * 3 + i]) ++level;
      levels.push_back(level < 256 ? level : 1000);
    }
  }
  return levels;
}

Levels by_cpu(const Wish& wish) {
  cpu::Copies copies;
  copies.reset({wish.picture->pixels.data(), wish.picture->height, wish.picture->width});
  cpu::Tile tile;
  tile.make(copies, wish.recipe(), wish.side);
  Levels levels;
  for (int y = 0; y < wish.side; y += wish.step)
    for (int x = 0; x < wish.side; x += wish.step)
      for (int c = 0; c < 3; ++c) levels.push_back(tile.plane(c)[y * wish.side + x]);
  return levels;
}

// Rescales columns of `in` values to columns of `out`, in floating point, and transposes the result.
Levels lowered_and_turned(const Levels& values, int in, int out) {
  const int columns = static_cast<int>(values.size()) / (3 * in);
  Levels result(3 * columns * out);
  const double scale = static_cast<double>(in) / out, reach = std::max(scale, 1.0);
  for (int i = 0; i < out; ++i) {
    for (int column = 0; column < columns; ++column) {
      for (int c = 0; c < 3; ++c) {
        double sum = 0, total = 0;
        for (int y = 0; y < in; ++y) {
          const double weight = std::max(0.0, 1 - std::abs(y + 0.5 - (i + 0.5) * scale) / reach);
          sum += weight * values[3 * (y * columns + column) + c];
          total += weight;
        }
        result[3 * (column * out + i) + c] = static_cast<int>(sum / total + 0.5);
      }
    }
  }
  return result;
}

// The window of a recipe without operations, always made from the original image.
Levels by_loops(const Wish& wish) {
  const Recipe r = wish.recipe();
  const int width = r.x2 - r.x1, height = r.y2 - r.y1;
  Levels window;
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      const int column = r.flip ? width - 1 - x : x;
      for (int c = 0; c < 3; ++c)
        window.push_back(wish.picture->pixels[3 * ((r.y1 + y) * wish.picture->width + r.x1 + column) + c]);
    }
  }
  return lowered_and_turned(lowered_and_turned(window, height, wish.side), width, wish.side);
}

// A job with the copies that it needs, in memory of exactly their size.
cuda::Job job_of(const Wish& wish, std::vector<std::vector<uint8_t>>& memory, std::vector<uint16_t>& weights) {
  cuda::Job job{};
  job.image = job.copy = {wish.picture->pixels.data(), wish.picture->height, wish.picture->width};
  job.recipe = wish.recipe();
  job.radius = blur_radius(job.recipe.sigma);
  job.first_weight = static_cast<int64_t>(weights.size());
  if (job.radius > 0) append_gauss(job.recipe.sigma, weights);
  job.side = wish.side;
  job.step = wish.step;
  job.places = wish.slots;
  job.halvings = halvings(job.recipe, wish.side);
  for (int n = 0; n < job.halvings; ++n) {
    const int height = job.copy.height / 2, width = job.copy.width / 2;
    memory.emplace_back(3 * height * width);
    const cuda::Halving halving{job.copy, memory.back().data()};
    emulation::launch({2, 1}, kBlock, cuda::halve, &halving);
    job.copy = {memory.back().data(), height, width};
  }
  return job;
}

// Makes all wishes in one launch, each on its own canvas; they must equal the CPU's. Unless `loops` is negative, tiles
// that are made from the original image must be within `loops` levels of the plain loops.
template <typename T>
void compare(const std::string& name, const std::vector<Wish>& wishes, int loops = -1) {
  std::vector<T> values;
  for (int i = 0; i < 3 * 256; ++i) values.push_back(value_of<T>(i / 256, i % 256));
  int side = 0;
  for (const Wish& wish : wishes) side = std::max(side, wish.slots * wish.shown() + 2 * kMargin);
  const T untouched = static_cast<T>(60000.5);
  std::vector<std::vector<T>> canvases(wishes.size(), std::vector<T>(3 * side * side, untouched));
  const auto corner = [&](size_t w, int slot) {
    return canvases[w].data() + 3 * (side + 1) * (kMargin + slot * wishes[w].shown());  // along the diagonal
  };
  std::vector<cuda::Job> jobs;
  std::vector<T*> places;
  std::vector<std::vector<uint8_t>> copies;
  std::vector<uint16_t> weights;
  int64_t words = 0;
  for (size_t w = 0; w < wishes.size(); ++w) {
    jobs.push_back(job_of(wishes[w], copies, weights));
    jobs[w].first_place = static_cast<int>(places.size());
    jobs[w].scratch = words;
    words += cuda::scratch_of(jobs[w]).words;
    for (int slot = 0; slot < wishes[w].slots; ++slot) places.push_back(corner(w, slot));
  }
  std::vector<uint32_t> scratch(words, 0xa5a5a5a5u);
  emulation::launch(jobs.size(), kBlock, cuda::make_tiles<T>, jobs.data(), places.data(), values.data(), weights.data(),
                    side, scratch.data());
  for (size_t w = 0; w < wishes.size(); ++w) {
    const std::string what = name + " " + std::to_string(w);
    const Levels expected = by_cpu(wishes[w]);
    const int shown = wishes[w].shown();
    for (int slot = 0; slot < wishes[w].slots; ++slot) {
      check::close(what, levels_in<T>(corner(w, slot), side, shown), expected, 0);
      for (int y = 0; y < shown; ++y) std::fill_n(corner(w, slot) + y * side * 3, 3 * shown, untouched);
    }
    check::close(what + ", beside its slots", canvases[w], std::vector<T>(3 * side * side, untouched), 0);
    if (loops < 0 || jobs[w].halvings > 0) continue;
    Levels near = by_loops(wishes[w]);
    for (size_t i = 0; i < near.size(); ++i)
      if (std::abs(near[i] - expected[i]) <= loops) near[i] = expected[i];
    check::close(what + ", by loops", near, expected, 0);
  }
}

// A recipe without operations.
std::vector<float> plain(float x1, float y1, float x2, float y2) {
  return {x1, y1, x2, y2, 0, 0, 0, 1, 2, 3, 1, 1, 1, 0, 0, 0, 0};
}

std::vector<float> with(std::vector<float> fields, std::initializer_list<std::pair<int, float>> changes) {
  for (const auto& [field, value] : changes) fields[field] = value;
  return fields;
}

enum Field { kFlip = 4, kJitter = 5, kOrder = 6, kFactors = 10, kGray = 14, kSigma = 15, kSolarize = 16 };

std::vector<float> random_window(const Picture& p, check::Random& draw) {
  const auto below = [&](double n) { return static_cast<float>(std::floor((draw() + 1) / 2 * n)); };
  const float x1 = below(p.width), y1 = below(p.height);
  const auto fields = plain(x1, y1, x1 + 1 + below(p.width - x1), y1 + 1 + below(p.height - y1));
  return with(fields, {{kFlip, below(2)}});
}

std::vector<float> with_random_operations(std::vector<float> fields, check::Random& draw) {
  const auto below = [&](double n) { return static_cast<float>(std::floor((draw() + 1) / 2 * n)); };
  for (const int on : {kFlip, kGray, kSolarize}) fields[on] = below(2);
  fields[kJitter] = below(4) > 0;
  for (int i = 3; i > 0; --i) std::swap(fields[kOrder + i], fields[kOrder + static_cast<int>(below(i + 1))]);
  for (int i = 0; i < 3; ++i) fields[kFactors + i] = static_cast<float>(1 + 0.8 * draw());
  fields[kFactors + 3] = static_cast<float>(draw() / 2);
  fields[kSigma] = below(2) * static_cast<float>(1.1 + draw());
  return fields;
}

// Recipes with invalid numbers among valid ones.
std::vector<float> absurd_recipe(check::Random& draw) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  constexpr float odd[] = {
      std::numeric_limits<float>::quiet_NaN(), inf, -inf, 1e30f, -1e30f, 3e9f, -1, 0, 0.3f, 1, 2, 7};
  std::vector<float> fields;
  for (int i = 0; i < kFields; ++i) fields.push_back(odd[static_cast<int>((draw() + 1) / 2 * std::size(odd))]);
  return fields;
}

// Every operation alone, and several orders of the jitter, in a window of the tile's size.
void operations(const Picture& p) {
  const auto same = plain(2, 1, 13, 12);
  const auto jittered = with(same, {{kJitter, 1}, {10, 1.4f}, {11, 0.6f}, {12, 1.3f}, {13, -0.1f}});
  const std::vector<std::vector<float>> recipes{
      same,
      with(same, {{kFlip, 1}}),
      with(same, {{kGray, 1}}),
      with(same, {{kSolarize, 1}}),
      with(same, {{kSigma, 0.3f}}),
      with(same, {{kSigma, 64}}),  // reflected several times
      with(same, {{kSigma, 1e-30f}}),
      jittered,
      with(jittered, {{6, 1}, {7, 0}}),                   // contrast first
      with(jittered, {{6, 3}, {9, 1}, {7, 0}}),           // last
      with(jittered, {{6, 1}, {7, 1}, {8, 1}, {9, -1}}),  // repeated
      with(jittered, {{kSigma, 2}, {kGray, 1}, {kSolarize, 1}, {kFlip, 1}}),
  };
  std::vector<Wish> wishes;
  for (const auto& recipe : recipes) wishes.push_back({&p, recipe, 11, 1, 2});
  compare<uint8_t>("operations", wishes);
}

// White stays white; sums of very many terms, whose truncation errors add up, are nearly white, and none overflows.
void white(check::Random& draw) {
  Picture p(700, 3, draw);
  std::fill(p.pixels.begin(), p.pixels.end(), 255);
  for (const bool many : {false, true}) {
    std::vector<Wish> wishes;
    for (const float sigma : {0.f, 0.3f, 1.f, 2.f, many ? 64.f : 8.f})
      for (const int side : {1, 3, 12})
        wishes.push_back({&p, with(plain(0, 0, 3, many ? 700 : 20), {{kSigma, sigma}}), side, 1, 1});
    compare<uint8_t>("white", wishes);
    for (const Wish& wish : wishes) {
      Levels levels = by_cpu(wish);
      for (int& level : levels)
        if (many && level >= 252) level = 255;
      check::close("white", levels, Levels(levels.size(), 255), 0);
    }
  }
}

// Windows of one pixel, column or row, and windows that are reduced along one axis and enlarged along the other.
void windows(const Picture& p) {
  const auto width = static_cast<float>(p.width), height = static_cast<float>(p.height);
  std::vector<Wish> wishes;
  for (const auto& window : {plain(0, 0, width, height), plain(3, 5, 4, 6), plain(2, 0, 3, height),
                             plain(0, 7, width, 8), plain(1, 1, width, 6), plain(1, 1, 5, height)})
    for (const int side : {1, 4, 17}) wishes.push_back({&p, window, side, 1, 1});
  compare<uint8_t>("windows", wishes, 1);
}

}  // namespace

int main() {
  check::Random draw;
  const Picture small(13, 21, draw), tall(150, 41, draw), wide(37, 163, draw), dot(1, 1, draw);
  operations(small);
#ifdef __SANITIZE_THREAD__  // slow
  const int number = 3;
#else
  windows(small);
  windows(tall);
  white(draw);
  const int number = 30;
#endif
  for (const Picture* p : {&small, &tall, &wide, &dot}) {
    std::vector<Wish> rescaled, coloured, all, absurd;
    for (int i = 0; i < number; ++i) {
      const int step = 1 << i % 4;  // as in the released code
      const int tile = 1 + i % 9;
      rescaled.push_back({p, random_window(*p, draw), 4 * tile, 1, 1 + i % 3});
      const int same = 1 + i % std::min({p->height, p->width, 20});
      const auto window = plain(0, 0, static_cast<float>(same), static_cast<float>(same));
      coloured.push_back({p, with_random_operations(window, draw), same, 1, 1});
      all.push_back({p, with_random_operations(random_window(*p, draw), draw), step * (1 + i % 5), step, 1 + i % 3});
      absurd.push_back({p, absurd_recipe(draw), 1 + i % 17, 1, 1});
    }
    rescaled.push_back({p, random_window(*p, draw), 64, 1, 1});
    compare<float>("rescaled", rescaled, 1);
    compare<uint16_t>("coloured", coloured);
    compare<float>("all", all);
    compare<uint8_t>("absurd", absurd);
  }
  return check::report();
}
