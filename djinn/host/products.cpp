// Products of bfloat16 weights and few bfloat16 vectors, where the weights lie in host memory.
//
// Reading the weights is what takes time, so everything here serves memory. Blocks of rows are handed out from one
// counter: in an even split the slowest core would decide. Four rows are read side by side, a kilobyte of each at a
// time, while what comes next is prefetched. Vectors are multiplied in groups by a piece of the rows that is in the
// cache by then.
//
// A bfloat16 is the upper half of a float32: a shift or a mask widens it, and a product of two is exact. Sums are
// float32, in the same order whatever else is multiplied, and are rounded once. Instructions for bfloat16 are not used:
// they take denormals as zero, and save only arithmetic, for which there is time while memory is waited for.
//
// Compiled once for each set of instructions that djinn/host/build.py knows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>

#include "threads.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, VECTORS = 2;  // half as many registers as the others
#else
constexpr int LANES = 4, VECTORS = 4;
#endif
constexpr int ROWS = 4, BLOCK = 32, MOST_VECTORS = 16;
constexpr long PAIR = 2 * LANES, PIECE = 512;  // columns

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Bf16;

struct Matrix {
    const Bf16* weights;  // [rows, columns]
    Bf16* results;        // [vectors, rows]
    int64_t rows;
    int64_t blocks() const { return (rows + BLOCK - 1) / BLOCK; }
};

struct Job {
    const Matrix* matrices;
    const Bf16* vectors;  // [count, columns]
    int64_t columns;
    int count;
};

// Adds products of `width` columns to sums[vector][row], and prefetches as many from `ahead`.
template <int R, int V>
inline void add(const Bf16* weights, const Bf16* vectors, long columns, long width, const Bf16* ahead,
                Floats (*sums)[ROWS]) {
    Floats sum[V][R];
    for (int v = 0; v < V; v++)
        for (int r = 0; r < R; r++) sum[v][r] = sums[v][r];
    for (long c = 0; c < width; c += PAIR) {
        Words pair, even[R], odd[R];
        for (int r = 0; r < R; r++) {
            if (ahead) __builtin_prefetch(ahead + r * columns + c);
            memcpy(&pair, weights + r * columns + c, sizeof pair);
            even[r] = pair << 16, odd[r] = pair & 0xffff0000u;
        }
        for (int v = 0; v < V; v++) {
            memcpy(&pair, vectors + v * columns + c, sizeof pair);
            Words x = pair << 16, y = pair & 0xffff0000u;
            for (int r = 0; r < R; r++) sum[v][r] += (Floats)even[r] * (Floats)x;
            for (int r = 0; r < R; r++) sum[v][r] += (Floats)odd[r] * (Floats)y;
        }
    }
    for (int v = 0; v < V; v++)
        for (int r = 0; r < R; r++) sums[v][r] = sum[v][r];
}

float widen(Bf16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    memcpy(&result, &bits, sizeof bits);
    return result;
}

Bf16 rounded(float value) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Multiplies R rows by all vectors; `next` is what is read after them, or null.
template <int R>
void multiply(const Job& job, const Bf16* weights, const Bf16* next, Bf16* results, int64_t rows) {
    const long columns = job.columns, paired = columns / PAIR * PAIR;
    Floats sums[MOST_VECTORS][ROWS] = {};
    for (long c = 0; c < paired; c += PIECE) {
        long width = std::min(paired - c, PIECE);
        const Bf16* ahead = c + width < paired ? weights + c + width : next;
        int v = 0;
        for (; v + VECTORS <= job.count; v += VECTORS, ahead = nullptr)
            add<R, VECTORS>(weights + c, job.vectors + v * columns + c, columns, width, ahead, sums + v);
        for (; v < job.count; v++, ahead = nullptr)
            add<R, 1>(weights + c, job.vectors + v * columns + c, columns, width, ahead, sums + v);
    }
    for (int v = 0; v < job.count; v++)
        for (int r = 0; r < R; r++) {
            float sum = 0;
            for (int lane = 0; lane < LANES; lane++) sum += sums[v][r][lane];
            for (long c = paired; c < columns; c++)
                sum += widen(weights[r * columns + c]) * widen(job.vectors[v * columns + c]);
            results[v * rows + r] = rounded(sum);
        }
}

void multiply_block(const Job& job, int64_t block) {
    const Matrix* matrix = job.matrices;
    for (; block >= matrix->blocks(); matrix++) block -= matrix->blocks();
    int64_t row = block * BLOCK, end = std::min(row + BLOCK, matrix->rows);
    const Bf16* weights = matrix->weights + row * job.columns;
    for (; row + ROWS <= end; row += ROWS, weights += ROWS * job.columns) {
        const Bf16* next = row + 2 * ROWS <= end ? weights + ROWS * job.columns : nullptr;
        multiply<ROWS>(job, weights, next, matrix->results + row, matrix->rows);
    }
    for (; row < end; row++, weights += job.columns)
        multiply<1>(job, weights, nullptr, matrix->results + row, matrix->rows);
}

}  // namespace

extern "C" {

// Returns null where the system starts no more threads; `cpus` as for Threads.
Threads* djinn_open(const int* cpus, int count) {
    try {
        return new Threads(cpus, count);
    } catch (const std::system_error&) {
        return nullptr;
    }
}

void djinn_close(Threads* threads) { delete threads; }

// Multiplies all matrices by all vectors, at most 16. One call at a time for each pool of threads.
void djinn_multiply(Threads* threads, const Matrix* matrices, int64_t many, const Bf16* vectors, int count,
                    int64_t columns) {
    Job job{matrices, vectors, columns, count};
    int64_t blocks = 0;
    for (int64_t i = 0; i < many; i++) blocks += matrices[i].blocks();
    threads->run(blocks, [&job](int64_t block) { multiply_block(job, block); });
}
}
