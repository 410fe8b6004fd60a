// Keeps what decoders say of broken images off the console: the loader names the file and says what is wrong.
//
// nvImageCodec, and OpenCV within it, write it to std::cerr, for each image and at each try, and DALI has no setting
// that is without it. Who sets DALI_NVIMGCODEC_LOG_LEVEL has asked for it. Whatever else they write, of memory, CUDA or
// decoders that cannot be made, is passed on.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <regex>
#include <streambuf>
#include <string>
#include <string_view>

namespace mcl {
namespace {

constexpr std::string_view kStarts[] = {"\033[0;31m[ERROR] \033[0m[", "[ERROR:", "[ WARN:"};  // written in pieces

bool is_of_an_image(const std::string& line) {
  static const std::regex pattern(
      R"((.*\] \S*\[\w+_(decoder|parser)\] (?=.*(decode |retrieve|parse|stream))|\[.*\] global (loadsave|grfmt_\w+)\.cpp))"
      R"((?!.*(CUDA|memory|alloc)))",
      std::regex::icase);
  return std::regex_search(line, pattern, std::regex_constants::match_continuous);
}

// Passes on all other lines.
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
  // Takes a part of a line, or all of it.
  void put(std::string_view part) {
    line_ += part;
    const bool ends = part.back() == '\n';
    if (!passing_ && !ends && may_be_one()) return;
    dropped_ = !passing_ && (is_of_an_image(line_) || (dropped_ && line_ == "\n"));  // OpenCV leaves lines empty
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
  static thread_local std::string line_;  // of this thread, as far as it is held back
  static thread_local bool passing_;      // the rest of the line follows its start
  static thread_local bool dropped_;      // the last line
};

thread_local std::string Filter::line_;
thread_local bool Filter::passing_ = false;
thread_local bool Filter::dropped_ = false;

// Never deleted: std::cerr may be written to until the process is gone.
[[maybe_unused]] const bool installed = [] {
  if (!std::getenv("DALI_NVIMGCODEC_LOG_LEVEL")) std::cerr.rdbuf(new Filter(std::cerr.rdbuf()));
  return true;
}();

}  // namespace
}  // namespace mcl
