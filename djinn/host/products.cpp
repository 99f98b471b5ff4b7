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

#include "queue.h"
#include "threads.h"

typedef uint16_t Bf16;

struct Matrix {
    const Bf16* weights;  // [rows, columns]
    const Bf16* bias;     // [rows], or null
    Bf16* results;        // [vectors, rows]
    int64_t rows;
};

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
int64_t blocks_of(const Matrix& matrix) { return (matrix.rows + BLOCK - 1) / BLOCK; }

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

// Multiplies R rows of a matrix, from `row` on, by all vectors; `next` is what is read after them, or null.
template <int R>
void multiply(const Job& job, const Matrix& matrix, int64_t row, const Bf16* next) {
    const Bf16* weights = matrix.weights + row * job.columns;
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
            Bf16 result = rounded(sum);
            if (matrix.bias) result = rounded(widen(result) + widen(matrix.bias[row + r]));
            matrix.results[v * matrix.rows + row + r] = result;
        }
}

void multiply_block(const Job& job, int64_t block) {
    const Matrix* matrix = job.matrices;
    for (; block >= blocks_of(*matrix); matrix++) block -= blocks_of(*matrix);
    int64_t row = block * BLOCK, end = std::min(row + BLOCK, matrix->rows);
    for (; row + ROWS <= end; row += ROWS) {
        const Bf16* next = row + 2 * ROWS <= end ? matrix->weights + (row + ROWS) * job.columns : nullptr;
        multiply<ROWS>(job, *matrix, row, next);
    }
    for (; row < end; row++) multiply<1>(job, *matrix, row, nullptr);
}

// Threads, and a lock for whoever uses them.
struct Pool {
    Threads threads;
    std::mutex one;

    void multiply(const Matrix* matrices, int64_t many, const Bf16* vectors, int64_t count, int64_t columns) {
        Job job{matrices, vectors, columns, int(count)};
        int64_t blocks = 0;
        for (int64_t i = 0; i < many; i++) blocks += blocks_of(matrices[i]);
        std::lock_guard<std::mutex> guard(one);
        threads.run(blocks, [&job](int64_t block) { multiply_block(job, block); });
    }
};

}  // namespace

extern "C" {

// Returns null where the system starts no more threads; `cpus` as for Threads.
Pool* djinn_open(const int* cpus, int count) {
    try {
        return new Pool{{cpus, count}, {}};
    } catch (const std::system_error&) {
        return nullptr;
    }
}

void djinn_close(Pool* pool) { delete pool; }

// Multiplies all matrices by all vectors, at most 16.
void djinn_multiply(Pool* pool, const Matrix* matrices, int64_t many, const Bf16* vectors, int count, int64_t columns) {
    pool->multiply(matrices, many, vectors, count, columns);
}

// Returns a queue whose products a thread on `cpu` computes with the pool, or null where the system starts none.
Queue* djinn_open_queue(Pool* pool, int cpu) {
    try {
        return new Queue(cpu, [pool](const Product& product) {
            pool->multiply(product.matrices, product.many, product.vectors, product.count, product.columns);
        });
    } catch (const std::system_error&) {
        return nullptr;
    }
}

void djinn_close_queue(Queue* queue) { delete queue; }

void djinn_put(Queue* queue, Product* product) { queue->put(product); }

int64_t djinn_unfinished(const Queue* queue) { return queue->unfinished(); }
}
