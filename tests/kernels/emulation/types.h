// Shared by the test programs with several element types.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

// Largest relative error of a result that is rounded to T.
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
