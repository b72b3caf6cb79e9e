// The entry of a compiled library: driver.py compiles this, a source, and a table of its kernels as one file.
#pragma once

#include <dlfcn.h>
#include <signal.h>

#include <type_traits>

#include "host.h"

namespace host {

// A kernel, and the kinds of its parameters: p(ointer), i(nt), f(loat), m(ap).
struct Kernel {
    const char* name;
    std::string kinds;
    void (*call)(void** arguments);
};

template <class T> constexpr char kind() {
    if constexpr (std::is_pointer_v<T>) return 'p';
    else if constexpr (std::is_same_v<T, float>) return 'f';
    else if constexpr (std::is_same_v<T, TensorMap>) return 'm';
    else {
        static_assert(std::is_integral_v<T> && sizeof(T) == 4, "a parameter that driver.py cannot pass");
        return 'i';
    }
}
template <auto KERNEL_FUNCTION, class... T, size_t... I>
Kernel describe(const char* name, void (*)(T...), std::index_sequence<I...>) {
    auto call = [](void** arguments) { KERNEL_FUNCTION(*static_cast<T*>(arguments[I])...); };
    return {name, {kind<T>()...}, call};
}
template <auto KERNEL_FUNCTION, class... T> Kernel describe(const char* name, void (*type)(T...)) {
    return describe<KERNEL_FUNCTION>(name, type, std::index_sequence_for<T...>());
}
extern const std::vector<Kernel> kernels;

struct Argument {
    long kind;
    u64 value;  // a pointer to host memory, to a map, or the bits of a number
};
struct Range {
    u8* base;
    u64 bytes;
};
struct Launch {
    const char* kernel;
    int grid, threads, shared_bytes;
    const Range* tensors;
    const Argument* arguments;
    int tensor_count, argument_count;
    u64 seed;
    double seconds;
    int sources_may_change, resident, cluster;
    char* failure;
    u64 failure_bytes;
};

inline void check_end(Fiber& fiber) {
    if (!fiber.warp->products.empty()) fail("the thread ends without waiting for its wgmma");
}

// Where the launch has its own copy of a tensor.
inline u8* own(const Launch& launch, u64 address) {
    auto memory = tensors.begin();
    for (int i = 0; i < launch.tensor_count; i++, memory++) {
        u64 offset = address - reinterpret_cast<u64>(launch.tensors[i].base);
        if (offset < launch.tensors[i].bytes) return memory->base + offset;
    }
    return nullptr;
}

inline void on_signal(int number, siginfo_t* info, void*) {
    const char* what = number == SIGILL ? "misaligned, out of an array's range, or a shift too far"
                                        : "an access out of range, or misaligned";
    std::string where = number == SIGILL ? "" : ": " + place(info->si_addr);
    fail(what + where);
}

inline void set_up(Machine& m, const Launch& launch) {
    u64 seed = (launch.seed + 1) * 0x9E3779B97F4A7C15ull;
    m.dice = (seed ^ seed >> 31) | 1;
    for (int i = 0; i < 8; i++) dice(2);
    m.stay = 2u << dice(6);
    m.prompt = dice(4);
    m.sources_may_change = launch.sources_may_change;
    m.end = time(nullptr) + static_cast<time_t>(launch.seconds) + 1;
    gridDim.x = launch.grid;
    blockDim.x = launch.threads;
    int blocks = launch.grid, warps = launch.threads / 32;
    m.live = blocks * launch.threads;
    m.cluster = launch.cluster;
    m.room = launch.resident;
    m.clusters.resize(blocks / launch.cluster);
    m.blocks.resize(blocks);
    m.warps.resize(blocks * warps);
    m.fibers.resize(m.live);
    void* stacks = mmap(nullptr, m.live * STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) abort();
    for (int b = 0; b < blocks; b++) {
        Memory& shared = shares.emplace_back(text("block %d's shared memory", b), launch.shared_bytes, 1024);
        Block& block = m.blocks[b];
        block.index = b;
        block.rank = b % launch.cluster;
        block.cluster = &m.clusters[b / launch.cluster];
        block.cluster->live += launch.threads;
        block.live = launch.threads;
        block.shared = shared.base;
        block.shared_bytes = launch.shared_bytes;
        for (int t = 0; t < launch.threads; t++) {
            int number = b * launch.threads + t;
            Fiber& fiber = m.fibers[number];
            fiber.stack = static_cast<u8*>(stacks) + number * STACK_BYTES;
            *reinterpret_cast<u64*>(fiber.stack) = STACK_END;
            fiber.block = &block;
            fiber.thread = t;
            fiber.warp = &m.warps[b * warps + t / 32];
            fiber.warp->block = &block;
            fiber.warp->index = t / 32;
            fiber.warp->rank = dice(~0u);
            prepare(fiber.context, fiber.stack, STACK_BYTES, run_fiber);
        }
    }
    start_blocks();
}

// Until all fibers have ended, or one has failed.
inline void run(Machine& m) {
    if (sigsetjmp(m.failed, 1)) return;
    Fiber& first = take_ready();
    enter(first);
    change(m.beginning, first.context);
    m.current = nullptr;
    m.speaker = "the launch";
    if (!m.events.empty()) fail("ended before " + m.events.top().speaker);
    for (auto* list : {&tensors, &shares})
        for (const Memory& memory : *list)
            if (!memory.intact()) fail("something was written just outside of " + memory.name);
    for (const Block& block : m.blocks)
        for (auto& at : block.barriers)
            if (at.second.bytes < 0) fail("bytes came that were never expected by " + name(at.second));
}

inline void run_with_signals(Machine& m) {
    static u8 stack[64 << 10];
    stack_t ours = {}, theirs;
    ours.ss_sp = stack;
    ours.ss_size = sizeof stack;
    sigaltstack(&ours, &theirs);
    constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL};
    struct sigaction before[3], action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &before[i]);
    run(m);
    for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &before[i], nullptr);
    sigaltstack(&theirs, nullptr);
}

inline u8* find_base() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(find_base), &info);
    return static_cast<u8*>(info.dli_fbase);
}
u8* const library_base = find_base();

inline std::string launch(const Launch& launch) {
    const Kernel* kernel = nullptr;
    std::string kinds;
    for (const Kernel& one : kernels)
        if (!strcmp(one.name, launch.kernel)) kernel = &one;
    for (int i = 0; i < launch.argument_count; i++) kinds += static_cast<char>(launch.arguments[i].kind);
    if (!kernel) return text("there is no kernel %s", launch.kernel);
    if (kinds != kernel->kinds)
        return text("%s takes (%s), not (%s)", kernel->name, kernel->kinds.c_str(), kinds.c_str());
    if (launch.threads < 32 || launch.threads > 1024 || launch.threads % 32)
        return "a block has 32 to 1024 threads, in whole warps";
    if (launch.shared_bytes > 227 << 10) return "more shared memory than a block has";
    if (launch.cluster < 1 || launch.cluster > 8) return "a cluster has 1 to 8 blocks";
    if (launch.grid % launch.cluster) return "the blocks are not whole clusters";
    if (launch.resident < launch.cluster) return "no room for all blocks of a cluster at a time";

    for (int i = 0; i < launch.tensor_count; i++) {
        const Range& tensor = launch.tensors[i];
        Memory& memory = tensors.emplace_back(text("tensor %d", i), tensor.bytes, 256);
        memcpy(memory.base, tensor.base, tensor.bytes);
    }
    std::vector<TensorMap> maps(launch.argument_count);
    std::vector<u64> values(launch.argument_count);
    std::vector<void*> arguments;
    for (int i = 0; i < launch.argument_count; i++) {
        const Argument& argument = launch.arguments[i];
        values[i] = argument.value;
        arguments.push_back(&values[i]);
        if (argument.kind == 'p') values[i] = reinterpret_cast<u64>(own(launch, argument.value));
        if (argument.kind != 'm') continue;
        memcpy(static_cast<void*>(&maps[i]), reinterpret_cast<void*>(argument.value), sizeof(TensorMap));
        maps[i].base = own(launch, reinterpret_cast<u64>(maps[i].base));
        arguments.back() = &maps[i];
    }
    Machine m;
    machine = &m;
    m.kernel = kernel->call;
    m.arguments = arguments.data();
    set_up(m, launch);
    run_with_signals(m);
    munmap(m.fibers[0].stack, m.fibers.size() * STACK_BYTES);
    auto memory = tensors.begin();
    for (int i = 0; i < launch.tensor_count; i++, memory++)
        memcpy(launch.tensors[i].base, memory->base, launch.tensors[i].bytes);
    tensors.clear();
    shares.clear();
    return m.failure;
}

}  // namespace host

extern "C" __attribute__((visibility("default"))) void host_launch(const host::Launch* launch) {
    snprintf(launch->failure, launch->failure_bytes, "%s", host::launch(*launch).c_str());
}
