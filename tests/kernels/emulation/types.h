// What the test programs of several element types share.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

// Largest error of a result, relative to what is rounded to T.
template <typename T>
constexpr double kTolerance = 1e-12;
template <>
constexpr double kTolerance<float> = 1e-5;
template <>
constexpr double kTolerance<c10::Half> = 2e-3;
template <>
constexpr double kTolerance<c10::BFloat16> = 1.6e-2;

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;
