// Compiles a function for several instruction sets, of which the dynamic loader selects one. Programs with sanitizers
// crash in the selection, so they get a single version.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define MCL_VECTORIZE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MCL_VECTORIZE
#endif
