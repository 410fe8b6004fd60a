// Removes decoders' messages about broken images from std::cerr: the loader reports the file and the reason itself.
//
// nvImageCodec, and OpenCV within it, write these messages for each image at each attempt, and DALI cannot turn them
// off. Nothing is removed if DALI_NVIMGCODEC_LOG_LEVEL is set. All other messages, such as those about memory, CUDA or
// decoders that cannot be created, are passed on.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <regex>
#include <streambuf>
#include <string>
#include <string_view>

namespace mcl {
namespace {

constexpr std::string_view kStarts[] = {"\033[0;31m[ERROR] \033[0m[", "[ERROR:", "[ WARN:"};

bool is_of_an_image(const std::string& line) {
  static const std::regex pattern(
      R"((.*\] \S*\[\w+_(decoder|parser)\] (?=.*(decode |retrieve|parse|stream))|\[.*\] global (loadsave|grfmt_\w+)\.cpp))"
      R"((?!.*(CUDA|memory|alloc)))",
      std::regex::icase);
  return std::regex_search(line, pattern, std::regex_constants::match_continuous);
}

// Drops the lines that is_of_an_image finds, and passes on all others. Lines may be written in pieces.
class Filter : public std::streambuf {
 public:
  explicit Filter(std::streambuf* to) : to_(to) {}

 protected:
  int_type overflow(int_type c) override {
    const char character = traits_type::to_char_type(c);
    if (c != traits_type::eof()) put({&character, 1});
    return traits_type::not_eof(c);
  }

  std::streamsize xsputn(const char* text, std::streamsize n) override {
    for (std::string_view rest(text, n); !rest.empty();) {
      const size_t end = std::min(rest.find('\n'), rest.size() - 1) + 1;
      put(rest.substr(0, end));
      rest.remove_prefix(end);
    }
    return n;
  }

  int sync() override { return to_->pubsync(); }

 private:
  // `part` is a line or a part of one.
  void put(std::string_view part) {
    line_ += part;
    const bool ends = part.back() == '\n';
    if (!passing_ && !ends && may_be_one()) return;
    dropped_ = !passing_ && (is_of_an_image(line_) || (dropped_ && line_ == "\n"));  // OpenCV adds an empty line
    if (!dropped_) to_->sputn(line_.data(), static_cast<std::streamsize>(line_.size()));
    line_.clear();
    passing_ = !ends;
  }

  static bool may_be_one() {
    for (const auto& start : kStarts)
      if (start.substr(0, line_.size()) == std::string_view(line_).substr(0, start.size())) return true;
    return false;
  }

  std::streambuf* to_;
  static thread_local std::string line_;  // the start of this thread's line that has not been written yet
  static thread_local bool passing_;      // whether the start of the line has been passed on, and the rest must follow
  static thread_local bool dropped_;      // whether the last line was dropped
};

thread_local std::string Filter::line_;
thread_local bool Filter::passing_ = false;
thread_local bool Filter::dropped_ = false;

// Never deleted, since std::cerr may be written to until the process ends.
[[maybe_unused]] const bool installed = [] {
  if (!std::getenv("DALI_NVIMGCODEC_LOG_LEVEL")) std::cerr.rdbuf(new Filter(std::cerr.rdbuf()));
  return true;
}();

}  // namespace
}  // namespace mcl
