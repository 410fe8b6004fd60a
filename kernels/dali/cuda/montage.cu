#include "dali/cuda/montage.cuh"

#include "dali/core/cuda_error.h"
#include "dali/gauss.h"
#include "dali/kernels/dynamic_scratchpad.h"
#include "dali/montage.h"

namespace mcl::montage {
namespace {

constexpr unsigned kHalvingBlocks = 32;  // per image

class MontageGpu : public Montage<dali::GPUBackend> {
 public:
  explicit MontageGpu(const dali::OpSpec& spec) : Montage(spec) {}

 protected:
  void RunImpl(dali::Workspace& ws) override {
    for_type([&](auto zero) { run<decltype(zero)>(ws); });
  }

 private:
  std::vector<cuda::Job> jobs_;
  int64_t words_ = 0;                // of scratch memory that the jobs need
  std::vector<uint16_t> weights_;    // of all blurs
  std::vector<int> smallest_;        // how often each image is halved
  std::vector<cuda::Image> copies_;  // the smallest copy of each image

  // Launches one kernel for each halving of images, then one for all tiles. Memory comes from DALI's pools and is freed
  // in the order of the stream.
  template <typename T>
  void run(dali::Workspace& ws) {
    const std::vector<T*> places = list_jobs<T>(ws);
    dali::kernels::DynamicScratchpad memory(ws.stream());
    halve_images(ws, memory);
    const auto [jobs, corners, values, weights] =
        memory.ToContiguousGPU(ws.stream(), jobs_, places, this->template values<T>(), weights_);
    auto* scratch = memory.AllocateGPU<uint32_t>(words_, 16);
    cuda::make_tiles<T><<<static_cast<unsigned>(jobs_.size()), cuda::kThreads, 0, ws.stream()>>>(
        jobs, corners, values, weights, side_, scratch);
    CUDA_CALL(cudaGetLastError());
  }

  // Makes the copies that jobs need, and sets `copy` of every job.
  void halve_images(dali::Workspace& ws, dali::kernels::DynamicScratchpad& memory) {
    const auto& images = ws.Input<dali::GPUBackend>(0);
    copies_.resize(images_);
    for (int i = 0; i < images_; ++i) copies_[i] = image_of(images, i);
    for (int n = 0;; ++n) {
      for (cuda::Job& job : jobs_)
        if (job.halvings == n) job.copy = copies_[job.source];
      std::vector<cuda::Halving> halvings;
      for (int i = 0; i < images_; ++i) {
        if (smallest_[i] <= n) continue;
        cuda::Image& copy = copies_[i];
        const int height = copy.height / 2, width = copy.width / 2;
        halvings.push_back({copy, memory.AllocateGPU<uint8_t>(static_cast<size_t>(3) * height * width)});
        copy = {halvings.back().to, height, width};
      }
      if (halvings.empty()) return;
      const dim3 grid(kHalvingBlocks, static_cast<unsigned>(halvings.size()));
      cuda::halve<<<grid, cuda::kThreads, 0, ws.stream()>>>(memory.ToGPU(ws.stream(), halvings));
      CUDA_CALL(cudaGetLastError());
    }
  }

  static cuda::Image image_of(const dali::TensorList<dali::GPUBackend>& images, int i) {
    const auto shape = images.shape()[i];
    return {images.tensor<uint8_t>(i), static_cast<int>(shape[0]), static_cast<int>(shape[1])};
  }

  // Fills `jobs_` level by level, so that large tiles start first and small ones fill the gaps at the end. Returns the
  // address of the first pixel of each tile slot.
  template <typename T>
  std::vector<T*> list_jobs(dali::Workspace& ws) {
    const auto& images = ws.Input<dali::GPUBackend>(0);
    const auto &recipes = ws.Input<dali::CPUBackend>(1), &slots = ws.Input<dali::CPUBackend>(2);
    std::vector<T*> canvases, places;
    for (int view = 0; view < views_; ++view) {
      auto& output = ws.Output<dali::GPUBackend>(view);
      DALI_ENFORCE(output.IsContiguous(), "montage: the output is not contiguous");
      output.SetLayout("HWC");
      canvases.push_back(output.template mutable_tensor<T>(0));
    }
    jobs_.clear();
    weights_.assign(1, 0);  // an upload must not be empty
    words_ = 0;
    smallest_.assign(images_, 0);
    const int levels = static_cast<int>(levels_.size());
    for (int l = 0; l < levels; ++l) {
      const Level& level = levels_[l];
      for (int view = 0; view < views_; ++view) {
        for (int i = 0; i < images_; ++i) {
          const int* slot = slots.template tensor<int>(i) + view * slots_ + level.first_slot;
          add_job(images, recipes.template tensor<float>(i) + (view * levels + l) * kFields, i, level);
          jobs_.back().first_place = static_cast<int>(places.size());
          for (int s = 0; s < level.slots; ++s) places.push_back(canvases[view] + 3 * corner_of(level, slot[s]));
        }
      }
    }
    return places;
  }

  void add_job(const dali::TensorList<dali::GPUBackend>& images, const float* fields, int i, const Level& level) {
    cuda::Job job{};
    job.source = i;
    job.image = image_of(images, i);
    job.recipe = read_recipe(fields, job.image.height, job.image.width);
    job.radius = blur_radius(job.recipe.sigma);
    job.first_weight = static_cast<int64_t>(weights_.size());
    if (job.radius > 0) append_gauss(job.recipe.sigma, weights_);
    job.step = released_ ? level.ratio : 1;
    job.side = tile_of(level) * job.step;
    job.halvings = halvings(job.recipe, job.side);
    job.places = level.slots;
    job.scratch = words_;
    words_ += cuda::scratch_of(job).words;
    smallest_[i] = std::max(smallest_[i], job.halvings);
    jobs_.push_back(job);
  }
};

}  // namespace
}  // namespace mcl::montage

DALI_REGISTER_OPERATOR(mcl__Montage, ::mcl::montage::MontageGpu, dali::GPU);
