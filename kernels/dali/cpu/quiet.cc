// Keeps DALI's own errors about broken images off the console: the loader names the file and says what is wrong.
//
// nvImageCodec writes them to std::cerr, for each image and at each try, and DALI has no setting that is without them.
// Who sets DALI_NVIMGCODEC_LOG_LEVEL has asked for them.
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <limits>
#include <streambuf>
#include <string_view>

namespace mcl {
namespace {

constexpr std::string_view kError = "\033[0;31m[ERROR] \033[0m[";  // what such a line starts with; written in pieces
constexpr size_t kOther = std::numeric_limits<size_t>::max();

// Passes on all lines but those.
class Filter : public std::streambuf {
 public:
  explicit Filter(std::streambuf* to) : to_(to) {}

 protected:
  int_type overflow(int_type c) override {
    if (c != traits_type::eof()) put(traits_type::to_char_type(c));
    return traits_type::not_eof(c);
  }

  std::streamsize xsputn(const char* text, std::streamsize n) override {
    if (n > 0 && (matched_ == 0 || matched_ == kOther) && !std::memchr(text, kError[0], n)) {
      to_->sputn(text, n);  // in one piece
      matched_ = text[n - 1] == '\n' ? 0 : kOther;
    } else {
      for (std::streamsize i = 0; i < n; ++i) put(text[i]);
    }
    return n;
  }

  int sync() override { return to_->pubsync(); }

 private:
  void put(char c) {
    if (matched_ < kError.size()) {
      if (c == kError[matched_]) {
        ++matched_;
        return;
      }
      to_->sputn(kError.data(), static_cast<std::streamsize>(matched_));
      matched_ = kOther;
    }
    if (matched_ == kOther) to_->sputc(c);
    if (c == '\n') matched_ = 0;
  }

  std::streambuf* to_;
  static thread_local size_t matched_;  // characters of kError in this thread's line so far; kOther: another line
};

thread_local size_t Filter::matched_ = 0;

// Never deleted: std::cerr may be written to until the process is gone.
[[maybe_unused]] const bool installed = [] {
  if (!std::getenv("DALI_NVIMGCODEC_LOG_LEVEL")) std::cerr.rdbuf(new Filter(std::cerr.rdbuf()));
  return true;
}();

}  // namespace
}  // namespace mcl
