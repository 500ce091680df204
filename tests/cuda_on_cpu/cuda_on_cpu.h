// CUDA on the CPU, to test kernels where there is no GPU: a block's threads are fibers, switched at barriers and warp
// operations; blocks run one after the other. Stricter than the hardware where that finds bugs: shared memory starts as
// NaN and is fenced, asynchronous copies land late or at once, threads run in either order, alignment is checked.
#pragma once
#include "standard.h"

// inline: those of a file that are not launched need no code; hidden: each library has its own __shared__ variables
#define __global__ inline __attribute__((visibility("hidden")))
#define __device__
#define __host__
#define __grid_constant__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("cuda_shared")))
#define SHARED_MEMORY(type, name) type* name = reinterpret_cast<type*>(cuda_on_cpu::dynamic_shared)

struct uint3 { unsigned x, y, z; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static uint3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

// of the linker: where the __shared__ variables lie, if there are any
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_cuda_shared[], __stop_cuda_shared[];

namespace cuda_on_cpu {
constexpr int MAX_THREADS = 1024, WARP = 32, FENCE = 256;
constexpr size_t STACK_BYTES = 256 << 10;
enum State { RUNNABLE, AT_BARRIER, AT_WARP, DONE };
using WarpOp = void (*)(void** lanes, unsigned mask);

struct Copy {
    void* to;
    const void* from;
};

struct Thread {
    State state;
    bool started;
    jmp_buf at;
    unsigned mask;
    WarpOp op;
    void* operands;
    std::vector<Copy> issued;               // asynchronous copies not yet committed
    std::vector<std::vector<Copy>> groups;  // committed and not yet waited for
};

struct Warp {
    unsigned waiting, gone;  // lanes that wait in an operation; that have ended, or were never there
};

static Thread threads[MAX_THREADS];
static Warp warps[MAX_THREADS / WARP];
static unsigned char* stacks;
static int current, barrier_vote, barrier_result;
static unsigned launches;
static bool eager_copies;
static unsigned char* dynamic_shared;
static jmp_buf scheduler;
static char error[512];
static void (*run_thread)(void*);
static void* run_argument;

// Back to the scheduler, which comes back here when this thread may go on.
static __attribute__((noinline)) void leave(State state) {
    threads[current].state = state;
    if (_setjmp(threads[current].at) == 0) _longjmp(scheduler, 1);
}

template <typename... Arguments>
[[noreturn]] static __attribute__((noinline)) void fail(const char* format, Arguments... arguments) {
    int used = snprintf(error, sizeof error, "block (%u, %u, %u) thread (%u, %u, %u): ", blockIdx.x, blockIdx.y,
                        blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    snprintf(error + used, sizeof error - used, format, arguments...);
    _longjmp(scheduler, 2);
}

static void check_aligned(const void* pointer, const char* what) {
    if ((uintptr_t)pointer % 16) fail("%s: address %p is not a multiple of 16", what, pointer);
}

// The last lane of `mask` to arrive does `op` for all of them.
static void warp_operation(unsigned mask, WarpOp op, void* operands) {
    const int first = current / WARP * WARP;
    const unsigned own = 1u << (current - first), others = mask & ~own;
    Thread& me = threads[current];
    Warp& warp = warps[current / WARP];
    if (!(mask & own)) fail("a warp operation whose mask %08x leaves out its caller", mask);
    if (others & warp.gone) fail("lane %d of the mask %08x is not there", __builtin_ctz(others & warp.gone), mask);
    me.mask = mask, me.op = op, me.operands = operands;
    const bool complete = !(others & ~warp.waiting);
    void* lanes[WARP] = {};
    lanes[current - first] = operands;
    for (unsigned left = others & warp.waiting; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        Thread& other = threads[first + lane];
        if (other.mask != mask || other.op != op) fail("lane %d waits in another warp operation", lane);
        if (!complete) break;  // those that wait have been compared with each other
        lanes[lane] = other.operands;
        other.state = RUNNABLE;
    }
    if (!complete) {
        warp.waiting |= own;
        return leave(AT_WARP);
    }
    warp.waiting &= ~mask;
    op(lanes, mask);
}

template <typename T>
struct Shuffle {
    T value, result;
    int source;
};

template <typename T>
static T shuffle(unsigned mask, T value, int source) {
    Shuffle<T> mine = {value, value, source};
    warp_operation(mask, [](void** lanes, unsigned mask) {
        for (int lane = 0; lane < WARP; ++lane) {
            auto* to = static_cast<Shuffle<T>*>(lanes[lane]);
            if (!to) continue;
            auto* from = static_cast<Shuffle<T>*>(lanes[to->source]);
            if (!from) fail("lane %d reads from lane %d, not in the mask %08x", lane, to->source, mask);
            to->result = from->value;
        }
    }, &mine);
    return mine.result;
}

static int lane_index() { return current % WARP; }

// As the hardware: within groups of `width` lanes, a source outside the group is the lane itself.
template <typename T>
static T shuffle_bounded(unsigned mask, T value, int source, int width) {
    const int group = lane_index() / width * width;
    return shuffle(mask, value, source < group || source >= group + width ? lane_index() : source);
}

struct Vote {
    bool value;
    unsigned result;
};

static unsigned ballot(unsigned mask, bool value) {
    Vote mine = {value, 0};
    warp_operation(mask, [](void** lanes, unsigned) {
        unsigned result = 0;
        for (int lane = 0; lane < WARP; ++lane)
            if (lanes[lane] && static_cast<Vote*>(lanes[lane])->value) result |= 1u << lane;
        for (int lane = 0; lane < WARP; ++lane)
            if (lanes[lane]) static_cast<Vote*>(lanes[lane])->result = result;
    }, &mine);
    return mine.result;
}

struct Product {
    float* d;
    const unsigned *a, *b;
};

static float half_of(unsigned pair, int which) {
    const unsigned bits = which ? pair & 0xffff0000u : pair << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static void multiply(void** lanes, unsigned) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < WARP; ++lane) {
        auto* one = static_cast<Product*>(lanes[lane]);
        const int group = lane / 4, quad = lane % 4;
        for (int i = 0; i < 8; ++i)
            a[group + (i / 2 % 2) * 8][quad * 2 + i % 2 + (i / 4) * 8] = half_of(one->a[i / 2], i % 2);
        for (int i = 0; i < 4; ++i) b[quad * 2 + i % 2 + (i / 2) * 8][group] = half_of(one->b[i / 2], i % 2);
    }
    for (int lane = 0; lane < WARP; ++lane) {
        auto* one = static_cast<Product*>(lanes[lane]);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) one->d[i] += a[row][k] * b[k][column];
        }
    }
}

struct Transposed {
    unsigned* d;
    const void* row;
};

static void transpose(void** lanes, unsigned) {
    const auto element = [&](int row, int column) {
        return (unsigned)static_cast<const unsigned short*>(static_cast<Transposed*>(lanes[row])->row)[column];
    };
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = 8 * i + 2 * (lane % 4);
            static_cast<Transposed*>(lanes[lane])->d[i] = element(row, lane / 4) | element(row + 1, lane / 4) << 16;
        }
}

// A thread of one block after the other, until an error leaves it somewhere inside.
static void enter() {
    for (;;) {
        run_thread(run_argument);
        warps[current / WARP].gone |= 1u << current % WARP;
        leave(DONE);
    }
}

static void resume(int index) {
    current = index;
    threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y)};
    Thread& thread = threads[index];
    if (thread.started) _longjmp(thread.at, 1);
    thread.started = true;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + index * STACK_BYTES;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
}

// Runs a thread to its next stop; false after an error.
static __attribute__((noinline)) bool step(int index) {
    const int why = _setjmp(scheduler);
    if (why == 0) resume(index);
    return why == 1;
}

static bool release_barrier(int total) {
    int waiting = 0, done = 0;
    for (int i = 0; i < total; ++i) waiting += threads[i].state == AT_BARRIER, done += threads[i].state == DONE;
    if (!waiting || waiting + done < total) return false;
    for (int i = 0; i < total; ++i)
        if (threads[i].state == AT_BARRIER) threads[i].state = RUNNABLE;
    barrier_result = barrier_vote;
    barrier_vote = 0;
    return true;
}

static bool run_block(int total, bool backwards) {
    for (int i = 0; i * WARP < total; ++i) warps[i] = {0, total - i * WARP < WARP ? ~0u << (total - i * WARP) : 0};
    for (int i = 0; i < total; ++i) {
        threads[i].state = RUNNABLE;
        threads[i].issued.clear();
        threads[i].groups.clear();
    }
    barrier_vote = 0;
    for (;;) {
        bool moved = false;
        int done = 0;
        for (int i = 0; i < total; ++i) {
            const int index = backwards ? total - 1 - i : i;
            if (threads[index].state == RUNNABLE) {
                moved = true;
                if (!step(index)) return false;
            }
            done += threads[index].state == DONE;
        }
        if (done == total) return true;
        if (!moved && !release_barrier(total)) {
            snprintf(error, sizeof error, "block (%u, %u, %u): deadlock: threads wait at different barriers",
                     blockIdx.x, blockIdx.y, blockIdx.z);
            return false;
        }
    }
}

static bool fences_hold(size_t shared_bytes) {
    for (int i = 0; i < FENCE; ++i)
        if (dynamic_shared[-1 - i] != 0xff || dynamic_shared[shared_bytes + i] != 0xff) {
            snprintf(error, sizeof error, "block (%u, %u, %u): written outside its %zu bytes of dynamic shared memory",
                     blockIdx.x, blockIdx.y, blockIdx.z, shared_bytes);
            return false;
        }
    return true;
}

// Not counted as memory that may be written: hundreds of kernels, a library each, would not let the process fork.
static unsigned char* reserve(size_t bytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) abort();
    return static_cast<unsigned char*>(memory);
}

static bool run_grid(size_t shared_bytes) {
    const int total = blockDim.x * blockDim.y * blockDim.z;
    if (!stacks) stacks = reserve(MAX_THREADS * STACK_BYTES);
    auto* room = static_cast<unsigned char*>(aligned_alloc(FENCE, (shared_bytes + 3 * FENCE) / FENCE * FENCE));
    dynamic_shared = room + FENCE;
    bool good = true;
    unsigned number = launches++;
    for (unsigned z = 0; good && z < gridDim.z; ++z)
        for (unsigned y = 0; good && y < gridDim.y; ++y)
            for (unsigned x = 0; good && x < gridDim.x; ++x, ++number) {
                blockIdx = {x, y, z};
                memset(room, 0xff, shared_bytes + 2 * FENCE);
                if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
                eager_copies = number / 2 % 2;
                good = run_block(total, number % 2) && fences_hold(shared_bytes);
            }
    free(room);
    if (!good)
        for (auto& thread : threads) thread.started = false;
    return good;
}

// 'p' pointer to anything, else its elements; 'q' long long, 'f' float; '?' what a kernel may not take
template <typename P>
constexpr char kind() {
    if constexpr (std::is_pointer_v<P>) {
        using Element = std::remove_cv_t<std::remove_pointer_t<P>>;
        if (std::is_same_v<Element, bf16>) return 'H';
        if (std::is_same_v<Element, float>) return 'F';
        if (std::is_same_v<Element, int>) return 'I';
        if (std::is_same_v<Element, long long>) return 'Q';
        if (std::is_same_v<Element, signed char>) return 'B';
        return 'p';
    }
    return std::is_same_v<P, long long> ? 'q' : std::is_same_v<P, float> ? 'f' : '?';
}

static bool kinds_agree(const char* wanted, const char* given, size_t count) {
    if (strlen(given) != count) {
        snprintf(error, sizeof error, "%zu arguments for %zu parameters", strlen(given), count);
        return false;
    }
    for (size_t i = 0; i < count; ++i) {
        const bool both_pointers = (wanted[i] < 'a' || wanted[i] == 'p') && (given[i] < 'a' || given[i] == 'p');
        const bool untyped = wanted[i] == 'p' || given[i] == 'p';
        if (given[i] == wanted[i] || (both_pointers && untyped)) continue;
        snprintf(error, sizeof error, "argument %zu: the kernel takes '%c', given '%c'", i, wanted[i], given[i]);
        return false;
    }
    return true;
}

template <typename... P, size_t... I>
static void call(void (*kernel)(P...), void** values, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(values[I])...);
}

// values[i] points to the i-th argument, as cuLaunchKernel has it; nullptr when all went well, else what went wrong
template <typename... P>
static const char* launch(void (*kernel)(P...), const unsigned* grid, const unsigned* block, size_t shared_bytes,
                          void** values, const char* given) {
    const char wanted[] = {kind<P>()..., 0};
    if (!kinds_agree(wanted, given, sizeof...(P))) return error;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
    struct Call {
        void (*kernel)(P...);
        void** values;
    };
    static Call one;
    one = {kernel, values};
    run_argument = &one;
    run_thread = [](void* argument) {
        auto* it = static_cast<Call*>(argument);
        call(it->kernel, it->values, std::index_sequence_for<P...>());
    };
    return run_grid(shared_bytes) ? nullptr : error;
}
}  // namespace cuda_on_cpu

// Called by what -fsanitize=alignment puts in: the data begin with the place in the source.
struct SanitizedPlace {
    const char* file;
    unsigned line, column;
};
extern "C" __attribute__((used, visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(SanitizedPlace* place,
                                                                                            uintptr_t address) {
    cuda_on_cpu::fail("misaligned access at %s:%u to %p", place->file, place->line, (void*)address);
}

#include "cuda_functions.h"
