/* What both files of twins share: how arguments come, and the bits of a float. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TILE 2048
#define LANES 64
#define MAGNITUDE 0x7FFFFFFFu
#define INFINITE 0x7F800000u
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ARRAY(type, name) type *restrict name, int64_t name##_n
#define MATRIX(type, name) type *restrict name, int64_t name##_n, int64_t name##_m

typedef uint16_t u16;
typedef uint32_t u32;
typedef int64_t i64;
typedef uint8_t u8;

static inline u32 bits_of(float x) { u32 b; memcpy(&b, &x, 4); return b; }
static inline float float_of(u32 b) { float x; memcpy(&x, &b, 4); return x; }
static inline u32 key(float x) { return bits_of(x) & MAGNITUDE; }
