// FC_TARGET_BEGIN(sets) compiles what follows, up to FC_TARGET_END, for the instruction sets in the string `sets`.
#pragma once

// Formatters split a long string literal and _Pragma takes only one, so the preprocessor makes it of tokens.
#define FC_PRAGMA(...) _Pragma(#__VA_ARGS__)
#ifdef __clang__
#define FC_TARGET_BEGIN(sets) FC_PRAGMA(clang attribute push(__attribute__((target(sets))), apply_to = function))
#define FC_TARGET_END FC_PRAGMA(clang attribute pop)
#else
#define FC_TARGET_BEGIN(sets) FC_PRAGMA(GCC push_options) FC_PRAGMA(GCC target(sets))
#define FC_TARGET_END FC_PRAGMA(GCC pop_options)
#endif
