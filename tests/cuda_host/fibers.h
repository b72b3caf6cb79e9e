// The threads of a launch as fibers of one host thread, and what makes them wait for each other.
//
// All blocks are there at once, or as many clusters of them as there is room for. A fiber runs until it
// waits, or until the dice at a synchronising call make it give way; then the scheduler takes another.
// Which one is random, from the launch's seed: mostly one of the same warp, else of a warp with a high
// rank, and ranks change now and then, so that some warps and blocks run far ahead of others. Things
// that take time (copies) are events: they happen a random number of switches later. When no fiber can
// go on and no event is to come, the launch is dead and every waiting thread says for what, and where in
// the kernel.
#pragma once

#include <execinfo.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <functional>
#include <list>
#include <map>
#include <queue>
#include <string>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

namespace host {

struct Dimensions {
    u32 x = 1;
};

}  // namespace host

inline host::Dimensions threadIdx, blockIdx, blockDim, gridDim;

namespace host {

// --- Switching stacks ---

#ifdef __x86_64__

typedef void* Context;  // the stack pointer, above it what a function call must preserve

extern "C" __attribute__((visibility("hidden"))) void host_switch(Context* from, Context to);
asm(R"(
.text
.hidden host_switch
.globl host_switch
.type host_switch, @function
host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size host_switch, . - host_switch
)");

inline void prepare(Context& context, u8* stack, size_t bytes, void (*entry)()) {
    u64* top = reinterpret_cast<u64*>(stack + bytes);
    top[-1] = 0;  // where the entry would return to: the end of backtraces
    top[-2] = reinterpret_cast<u64>(entry);
    context = top - 8;  // below the entry, six registers
}
inline void change(Context& from, Context& to) { host_switch(&from, to); }

#else

typedef ucontext_t Context;  // slower: saves the signal mask by system calls

inline void prepare(Context& context, u8* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
inline void change(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

// --- Threads, warps, blocks ---

constexpr size_t STACK_BYTES = 64 << 10;
constexpr u64 STACK_END = 0x7061747320666F20ull;  // at the low end of each stack; gone after an overflow

struct Warp;
struct Block;
typedef std::string (*Describe)(const void* what, long value);

struct Fiber {
    Context context;
    u8* stack;
    Warp* warp;
    Block* block;
    int thread;
    // What it waits for; none while it can run.
    Describe describe = nullptr;
    const void* what = nullptr;
    long value = 0;
    u64 few_there = 0;       // when the last of its copies of single numbers is there
    u64 arrivals_there = 0;  // and of its arrivals at barriers of its cluster
    bool waited = false;     // for earlier launches
    bool fenced = false;     // wgmma_fence was called since the last wgmma_wait

    int lane() const { return thread % 32; }
};

// Fibers that wait until so many of them have come; each may bring something for the last one's work.
struct Meeting {
    const char* kind;
    u32 key;  // of several alike: the mask, or the barrier's number
    int expected;
    std::vector<Fiber*> fibers;
    std::vector<void*> brought;
};

// A product that wgmma_wait is to wait for; of this warp, 16 rows.
struct Product {
    int columns;
    u64 a, b;
    bool accumulate, bf16, done, registers;
    int batch;  // of those that wgmma_commit closed, or -1
    float* d[32];
    u32 words[32][4];  // of a, where it is in registers
};

struct Warp {
    Block* block;
    int index;  // in the block
    u64 rank;
    std::vector<Fiber*> ready;
    size_t place;  // in Machine::ready while a fiber is ready
    std::list<Meeting> meetings;
    std::vector<Product> products;
    int batches = 0;
};

struct Barrier {
    u64* at;
    int count, missing;
    long bytes = 0;
    int phase = 0;
    const Fiber* owner;
    bool ready = false;  // barriers_ready was called: copies may use it
    std::vector<Fiber*> waiters;
};

struct Cluster {
    int live = 0;
    std::list<Meeting> meetings;
};

struct Block {
    int index, rank, live;  // the rank is in the cluster
    Cluster* cluster;
    u8* shared;
    int shared_bytes;
    std::list<Meeting> meetings;
    std::map<u64*, Barrier> barriers;
    std::vector<std::pair<u8*, u8*>> landing;  // where copies under way will write
};

struct Event {
    u64 due, number;
    std::string speaker;  // who failed, where the event fails
    std::function<void()> act;
    bool operator<(const Event& other) const {
        return due != other.due ? due > other.due : number > other.number;
    }
};

// One launch.
struct Machine {
    std::vector<Cluster> clusters;
    std::vector<Block> blocks;
    std::vector<Warp> warps;
    std::vector<Fiber> fibers;
    Fiber* current = nullptr;  // none while an event acts
    std::string speaker;
    std::vector<Warp*> ready;
    Warp* last = nullptr;
    u64 dice;
    u32 stay;    // a warp that can go on is left once in so many switches
    u32 prompt;  // wgmma acts at once in so many of four cases
    bool sources_may_change;  // while they are copied
    u64 now = 0, numbered = 0;
    std::priority_queue<Event> events;
    std::vector<Fiber*> pollers;  // of global memory
    int live = 0;
    size_t started = 0;  // blocks; the others start in their turn, a cluster where there is room for it
    int cluster, room;   // blocks in each cluster, and that may start
    Context beginning;
    sigjmp_buf failed;
    std::string failure;
    bool reporting = false;
    Context reporter;
    std::string position;
    time_t end;
    void (*kernel)(void** arguments);
    void** arguments;
};

inline Machine* machine;

inline std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline std::string text(const char* format, ...) {
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

extern u8* const library_base;  // launch.h

// The calls that lead here, as `+0x...` offsets that the driver turns into lines.
inline std::string calls() {
    void* frames[24];
    int count = backtrace(frames, 24);
    std::string all;
    for (int i = 1; i < count; i++) all += text(" +0x%lx", static_cast<u8*>(frames[i]) - 1 - library_base);
    return all;
}

// Ends the launch.
[[noreturn]] inline void fail(const std::string& why) {
    Fiber* current = machine->current;
    std::string who = machine->speaker;
    if (current) who = text("block %d, thread %d", current->block->index, current->thread);
    machine->failure = who + ": " + why + (current ? calls() : "");
    siglongjmp(machine->failed, 1);
}

// Uniform below n.
inline u32 dice(u32 n) {
    u64& x = machine->dice;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    return static_cast<u32>(((x * 0x2545F4914F6CDD1Dull >> 32) * n) >> 32);
}

// From now, after at least one and mostly few switches, but at times some thousands.
inline u64 some_time() { return 1 + dice(1u << dice(13)); }

inline void later(u64 due, std::string speaker, std::function<void()> act) {
    machine->events.push({due, machine->numbered++, std::move(speaker), std::move(act)});
}

// --- The scheduler ---

inline void wake(Fiber& fiber) {
    fiber.describe = nullptr;
    Warp& warp = *fiber.warp;
    warp.ready.push_back(&fiber);
    if (warp.ready.size() > 1) return;
    warp.place = machine->ready.size();
    machine->ready.push_back(&warp);
}

inline Fiber& take_ready() {
    std::vector<Warp*>& ready = machine->ready;
    Warp* warp = machine->last;
    if (!warp || warp->ready.empty() || dice(machine->stay) == 0) {
        warp = ready[dice(ready.size())];
        for (int i = 0; i < 2; i++) {
            Warp* other = ready[dice(ready.size())];
            if (other->rank > warp->rank) warp = other;
        }
        if (dice(64) == 0) warp->rank = dice(~0u);
        machine->last = warp;
    }
    std::swap(warp->ready[dice(warp->ready.size())], warp->ready.back());
    Fiber& fiber = *warp->ready.back();
    warp->ready.pop_back();
    if (warp->ready.empty()) {
        ready[warp->place] = ready.back();
        ready[warp->place]->place = warp->place;
        ready.pop_back();
    }
    return fiber;
}

inline void poll() {
    std::vector<Fiber*>& all = machine->pollers;
    for (size_t i = 0; i < all.size();) {
        Fiber& fiber = *all[i];
        if (*static_cast<const volatile int*>(fiber.what) < fiber.value) {
            i++;
            continue;
        }
        all[i] = all.back();
        all.pop_back();
        wake(fiber);
    }
}

[[noreturn]] inline void report_deadlock(Fiber* self) {
    struct Group {
        Fiber* first;
        int last;
        std::string why;
    };
    std::vector<Group> groups;
    for (Fiber& fiber : machine->fibers) {
        if (!fiber.describe) continue;
        std::string why = fiber.describe(fiber.what, fiber.value);
        if (!groups.empty()) {
            Group& group = groups.back();
            if (group.first->block == fiber.block && group.last == fiber.thread - 1 && group.why == why) {
                group.last++;
                continue;
            }
        }
        groups.push_back({&fiber, fiber.thread, why});
    }
    std::string all = "nothing can go on:";
    size_t shown = std::min<size_t>(groups.size(), 20);
    for (size_t i = 0; i < shown; i++) {
        Group& group = groups[i];
        machine->reporting = true;
        if (group.first == self) machine->position = calls();
        else change(machine->reporter, group.first->context);
        machine->reporting = false;
        const Fiber& first = *group.first;
        all += text("\n  block %d, threads %d to %d: ", first.block->index, first.thread, group.last);
        all += group.why + machine->position;
    }
    if (shown < groups.size()) all += text("\n  and %zu more such lines", groups.size() - shown);
    machine->failure = all;
    siglongjmp(machine->failed, 1);
}

// The next fiber to run; events that are due happen first.
inline Fiber& next(Fiber* self) {
    Machine& m = *machine;
    m.current = nullptr;
    m.now++;
    if (m.now % 65536 == 0 && time(nullptr) > m.end) {
        m.speaker = "the launch";
        fail("has not ended in the seconds that it has");
    }
    for (;;) {
        while (!m.events.empty() && m.events.top().due <= m.now) {
            Event event = m.events.top();
            m.events.pop();
            m.speaker = event.speaker;
            event.act();
        }
        if (m.now % 32 == 0 || m.ready.empty()) poll();
        if (!m.ready.empty()) return take_ready();
        if (m.events.empty()) report_deadlock(self);
        m.now = m.events.top().due;
    }
}

inline void enter(Fiber& fiber) {
    machine->current = &fiber;
    threadIdx.x = fiber.thread;
    blockIdx.x = fiber.block->index;
}

inline void switch_from(Fiber& self) {
    Fiber& to = next(&self);
    enter(to);
    if (&to == &self) return;
    if (*reinterpret_cast<u64*>(self.stack) != STACK_END) fail("the fiber's stack is too small");
    change(self.context, to.context);
    while (machine->reporting) {
        machine->position = calls();
        change(self.context, machine->reporter);
    }
}

// Until another fiber or an event wakes this one.
inline void wait_for(Describe describe, const void* what, long value = 0) {
    Fiber& self = *machine->current;
    self.describe = describe;
    self.what = what;
    self.value = value;
    switch_from(self);
}

// Gives way once in n times.
inline void maybe_yield(u32 n = 8) {
    if (dice(n)) return;
    Fiber& self = *machine->current;
    wake(self);
    switch_from(self);
}

// --- Meetings ---

inline std::string describe_meeting(const void* what, long) {
    const Meeting& meeting = *static_cast<const Meeting*>(what);
    size_t there = meeting.fibers.size();
    return text("%s (%x): %zu of %d are there", meeting.kind, meeting.key, there, meeting.expected);
}

inline void end_meeting(Meeting& meeting) {
    for (Fiber* fiber : meeting.fibers)
        if (fiber != machine->current) wake(*fiber);
    meeting.fibers.clear();
    meeting.brought.clear();
}

// The last of the `expected` fibers acts on what all brought; then all go on.
template <class Act>
void meet(std::list<Meeting>& place, const char* kind, u32 key, int expected, void* mine, Act act) {
    Meeting* meeting = nullptr;
    for (Meeting& open : place)
        if (open.key == key && !strcmp(open.kind, kind)) meeting = &open;
    if (!meeting) meeting = &place.emplace_back(Meeting{kind, key, expected, {}, {}});
    if (meeting->fibers.empty()) meeting->expected = expected;
    if (meeting->expected != expected)
        fail(text("%s (%x) of %d threads, others come to one of %d", kind, key, expected, meeting->expected));
    meeting->fibers.push_back(machine->current);
    meeting->brought.push_back(mine);
    if (static_cast<int>(meeting->fibers.size()) < expected) return wait_for(describe_meeting, meeting);
    act(*meeting);
    end_meeting(*meeting);
    maybe_yield(2);
}
inline void no_act(Meeting&) {}

template <class Lane, class Act> void meet_warp(const char* kind, u32 mask, Lane& mine, Act act) {
    Fiber& self = *machine->current;
    int lane = self.lane();
    if (!(mask >> lane & 1)) fail(text("%s with mask %x, which lacks lane %d", kind, mask, lane));
    meet(self.warp->meetings, kind, mask, __builtin_popcount(mask), &mine, [&](Meeting& meeting) {
        Lane* lanes[32] = {};
        for (size_t i = 0; i < meeting.fibers.size(); i++)
            lanes[meeting.fibers[i]->lane()] = static_cast<Lane*>(meeting.brought[i]);
        act(lanes);
    });
}

// --- The life of a fiber ---

void check_end(Fiber& fiber);  // launch.h: nothing that it started is left

constexpr const char *SYNCTHREADS = "__syncthreads", *CLUSTER_SYNC = "cluster_sync";

inline void start_blocks() {
    Machine& m = *machine;
    while (m.started < m.blocks.size() && m.room >= m.cluster) {
        // Blocks of a cluster have their places at once, but one may begin later.
        const int late = m.cluster > 1 && dice(2) ? dice(m.cluster) : -1;
        for (int i = 0; i < m.cluster; i++, m.room--) {
            const Block& block = m.blocks[m.started++];
            auto start = [&m, first = block.index * block.live, live = block.live] {
                for (int t = 0; t < live; t++) wake(m.fibers[first + t]);
            };
            if (i == late) later(m.now + 1 + dice(1u << dice(20)), "a block's start", start);
            else start();
        }
    }
}

// Threads that have ended count as arrived.
inline void leave(std::list<Meeting>& place, const char* kind, int live) {
    for (Meeting& meeting : place) {
        if (meeting.kind != kind || meeting.fibers.empty()) continue;
        meeting.expected = live;
        if (static_cast<int>(meeting.fibers.size()) == live) end_meeting(meeting);
    }
}

inline void run_fiber() {
    machine->kernel(machine->arguments);
    Fiber& self = *machine->current;
    check_end(self);
    machine->live--;
    Block& block = *self.block;
    leave(block.meetings, SYNCTHREADS, --block.live);
    leave(block.cluster->meetings, CLUSTER_SYNC, --block.cluster->live);
    if (!block.live) machine->room++, start_blocks();
    if (machine->live) switch_from(self);
    else change(self.context, machine->beginning);
    __builtin_unreachable();
}

}  // namespace host

inline void __syncthreads() {
    host::Block& block = *host::machine->current->block;
    host::meet(block.meetings, host::SYNCTHREADS, 0, block.live, nullptr, host::no_act);
}
inline void named_sync(int id, int threads) {
    if (id < 1 || id > 15 || threads < 32 || threads % 32)
        host::fail(host::text("named_sync(%d, %d)", id, threads));
    host::meet(host::machine->current->block->meetings, "named_sync", id, threads, nullptr, host::no_act);
}
inline void __syncwarp(u32 mask = ~0u) {
    host::meet_warp("__syncwarp", mask, mask, [](u32**) {});
}
