// Memory that is watched, barriers in shared memory, copies that arrive late, atomics.
#pragma once

#include <memory>

#include "fibers.h"

struct alignas(64) TensorMap {  // as driver.py packs it
    u8* base;
    u64 strides[5];  // bytes, of each dimension; the first is the size of an element
    u32 dims[5], box[5];
    u32 rank, swizzled;
    u32 unused[4];
};
static_assert(sizeof(TensorMap) == 128);

namespace host {

// --- Memory between pages that fault; filled with 0xFF, which is NaN in every format ---

constexpr size_t GUARD = 64 << 20;

struct Memory {
    std::string name;
    u8 *pages, *base;
    size_t page_bytes, bytes;

    Memory(std::string name, size_t bytes, size_t alignment) : name(name), bytes(bytes) {
        size_t padded = (bytes + alignment - 1) / alignment * alignment;
        page_bytes = (padded + 4095) / 4096 * 4096;
        size_t all = page_bytes + 2 * GUARD;
        void* at = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) abort();
        pages = static_cast<u8*>(at) + GUARD;
        base = pages + page_bytes - padded;
        if (page_bytes && mprotect(pages, page_bytes, PROT_READ | PROT_WRITE)) abort();
        memset(pages, 0xFF, page_bytes);
    }
    Memory(const Memory&) = delete;
    ~Memory() { munmap(pages - GUARD, page_bytes + 2 * GUARD); }

    bool holds(const void* from, size_t count) const {
        const u8* at = static_cast<const u8*>(from);
        return at >= base && count <= bytes && at <= base + bytes - count;
    }
    bool near(const void* to) const {
        const u8* at = static_cast<const u8*>(to);
        return at >= pages - GUARD && at < pages + page_bytes + GUARD;
    }
    // What alignment left over at both sides was not written.
    bool intact() const {
        for (const u8* p = pages; p < base; p++)
            if (*p != 0xFF) return false;
        for (const u8* p = base + bytes; p < pages + page_bytes; p++)
            if (*p != 0xFF) return false;
        return true;
    }
};

inline std::list<Memory> tensors, shares;  // of the launch: its arguments, and each block's shared memory

inline std::string place(const void* at) {
    for (auto* list : {&tensors, &shares})
        for (const Memory& memory : *list) {
            long offset = static_cast<const u8*>(at) - memory.base;
            if (memory.near(at)) return text("byte %ld of %zu of ", offset, memory.bytes) + memory.name;
        }
    return text("address %p", at);
}

inline void check_shared(const void* at, int bytes, int alignment, const char* what) {
    Block& block = *machine->current->block;
    const u8* p = static_cast<const u8*>(at);
    if (p < block.shared || p + bytes > block.shared + block.shared_bytes)
        fail(text("%s: %d bytes from ", what, bytes) + place(at) + " are not in the block's shared memory");
    if ((p - block.shared) % alignment)
        fail(place(at) + text(", for %s, is not aligned to %d", what, alignment));
}
inline void check_global(const void* at, size_t bytes, int alignment, const char* what) {
    if (reinterpret_cast<u64>(at) % alignment)
        fail(place(at) + text(", for %s, is not aligned to %d", what, alignment));
    for (const Memory& memory : tensors)
        if (memory.holds(at, bytes)) return;
    fail(text("%s: %zu bytes from ", what, bytes) + place(at) + " are not in an argument");
}

// --- Barriers ---

constexpr u64 BARRIER = 0x7265697272616220ull;  // the word where a barrier is

inline Barrier& barrier_at(u64* at, const char* what, Block& block = *machine->current->block) {
    auto& all = block.barriers;
    auto found = all.find(at);
    if (found == all.end()) fail(text("%s: there is no barrier at ", what) + place(at));
    if (*at != BARRIER) fail(text("%s: overwritten was the barrier at ", what) + place(at));
    return found->second;
}
// For copies, and for other blocks.
inline Barrier& ready_barrier(u64* at, const char* what, Block& block = *machine->current->block) {
    Barrier& barrier = barrier_at(at, what, block);
    if (!barrier.ready) fail(text("%s without barriers_ready, to the barrier at ", what) + place(at));
    return barrier;
}
inline std::string name(const Barrier& barrier) {
    return "the barrier at " + place(barrier.at) +
           text(" (phase %d, %d of %d arrivals and %ld bytes missing)", barrier.phase, barrier.missing,
                barrier.count, barrier.bytes);
}
inline std::string describe_wait(const void* what, long phase) {
    return text("wait for phase %ld of ", phase) + name(*static_cast<const Barrier*>(what));
}

inline void advance(Barrier& barrier) {
    if (barrier.missing || barrier.bytes) return;
    barrier.phase++;
    barrier.missing = barrier.count;
    for (Fiber* fiber : barrier.waiters) wake(*fiber);
    barrier.waiters.clear();
}
inline void arrive(Barrier& barrier, int bytes = 0) {
    if (!barrier.missing) fail("one arrival too many at " + name(barrier));
    if (bytes < 0 || barrier.bytes + bytes >= 1 << 20)
        fail(text("%d bytes more for ", bytes) + name(barrier));
    barrier.bytes += bytes;
    barrier.missing--;
    if (!barrier.missing && barrier.bytes < 0) fail("bytes came that were not expected by " + name(barrier));
    advance(barrier);
}
// Those of another block's copy may come before barrier_expect, while an arrival holds the phase.
inline void bytes_came(Barrier& barrier, int bytes, bool own) {
    if (bytes > barrier.bytes && (own || !barrier.missing))
        fail(text("%d bytes came that were not expected by ", bytes) + name(barrier));
    barrier.bytes -= bytes;
    advance(barrier);
}

// --- Blocks of a cluster ---

inline Block& block_of_cluster(int rank, const char* what) {
    const Block& own = *machine->current->block;
    if (rank < 0 || rank >= machine->cluster)
        fail(text("%s: block %d of a cluster of %d", what, rank, machine->cluster));
    Block& block = machine->blocks[own.index - own.rank + rank];
    if (!block.live) fail(text("%s: block %d has ended", what, block.index));
    return block;
}
// The same place in another block's shared memory.
template <class T> T* in_block(T* own, const Block& block) {
    u64 offset = reinterpret_cast<u8*>(own) - machine->current->block->shared;
    return reinterpret_cast<T*>(block.shared + offset);
}

// What a thread has started and is late: who it was, and that it finds the block that it goes to.
inline std::string started(const char* what) {
    return text("block %d, thread %d's %s", machine->current->block->index, machine->current->thread, what);
}
inline void check_live(const Block& block) {
    if (!block.live) fail(text("it arrives after the end of block %d", block.index));
}

// --- Copies ---

// `gather` reads the source, now and when the data arrives; what changed in between arrives as NaN,
// which the destination, in that block, is until then. `swizzled`: by address, bits 4 to 6 ^= bits 7 to 9.
inline void start_copy(Block& block, void* to, int bytes, bool swizzled, u64 due, Barrier* barrier,
                       const char* what, std::function<void(u8*)> gather) {
    struct Copy {
        u8* to;
        std::vector<u8> bytes;
    };
    auto copy = std::make_shared<Copy>(Copy{static_cast<u8*>(to), std::vector<u8>(bytes)});
    std::pair<u8*, u8*> range(copy->to, copy->to + bytes);
    for (auto& other : block.landing)
        if (other.first < range.second && range.first < other.second)
            fail(text("%s: another copy to %s is under way", what, place(to).c_str()));
    block.landing.push_back(range);
    gather(copy->bytes.data());
    memset(to, 0xFF, bytes);
    bool own = &block == machine->current->block;
    later(due, started(what), [=, &block] {
        check_live(block);
        std::vector<u8> again(bytes);
        gather(again.data());
        if (again != copy->bytes && !machine->sources_may_change) fail("its source was changed meanwhile");
        for (int i = 0; i < bytes; i += 4)
            if (memcmp(&again[i], &copy->bytes[i], 4)) memset(&again[i], 0xFF, 4);
        if (swizzled) {
            for (int i = 0; i < bytes; i += 16) {
                u64 at = reinterpret_cast<u64>(copy->to) + i;
                memcpy(reinterpret_cast<u8*>(at ^ (at >> 7 & 7) << 4), &again[i], 16);
            }
        } else {
            memcpy(copy->to, again.data(), bytes);
        }
        block.landing.erase(std::find(block.landing.begin(), block.landing.end(), range));
        if (barrier) bytes_came(*barrier, bytes, own);
    });
}

// Into each block of the cluster that has a bit in `blocks`, there each at its own time.
inline void start_boxes(void* to, const TensorMap* at, std::vector<int> from, u64* word, int blocks,
                        const char* what) {
    TensorMap map = *at;
    if (map.rank != from.size())
        fail(text("%s of %zu dimensions with a map of %u", what, from.size(), map.rank));
    int size = map.strides[0], bytes = size;
    for (u32 i = 0; i < map.rank; i++) bytes *= map.box[i];
    check_shared(to, bytes, 128, what);
    auto gather = [=](u8* into) {
        int row = map.box[0], rows = bytes / (row * size);
        for (int r = 0; r < rows; r++) {
            const u8* source = map.base;
            bool inside = true;
            for (u32 i = 1, rest = r; i < map.rank; rest /= map.box[i], i++) {
                int coordinate = from[i] + static_cast<int>(rest % map.box[i]);
                inside = inside && coordinate >= 0 && coordinate < static_cast<int>(map.dims[i]);
                source += coordinate * static_cast<long>(map.strides[i]);
            }
            for (int x = from[0]; x < from[0] + row; x++, into += size) {
                if (inside && x >= 0 && x < static_cast<int>(map.dims[0]))
                    memcpy(into, source + static_cast<long>(x) * size, size);
                else
                    memset(into, 0, size);
            }
        }
    };
    for (int rank = 0; blocks >> rank; rank++) {
        if (!(blocks >> rank & 1)) continue;
        Block& block = block_of_cluster(rank, what);
        Barrier& barrier = ready_barrier(in_block(word, block), what, block);
        u64 due = machine->now + some_time();
        start_copy(block, in_block(to, block), bytes, map.swizzled, due, &barrier, what, gather);
    }
}
inline void start_box(void* to, const TensorMap* map, std::vector<int> from, u64* barrier) {
    start_boxes(to, map, from, barrier, 1 << machine->current->block->rank, "copy_box");
}

inline std::string describe_poll(const void* what, long value) {
    int now = *static_cast<const int*>(what);
    return "wait until " + place(what) + text(", now %d, is at least %ld", now, value);
}

}  // namespace host

inline void wait_for_launches() { host::machine->current->waited = true; }
// What follows a launch counts on it: its successor may read before it waits what its predecessors wrote.
inline void let_next_start() {
    if (!host::machine->current->waited) host::fail("the next launch starts before this one has waited");
}

inline u32 shared_address(const void* pointer) {
    host::check_shared(pointer, 0, 1, "shared_address");
    return 1024 + static_cast<u32>(static_cast<const u8*>(pointer) - host::machine->current->block->shared);
}
inline void barrier_init(u64* barrier, int arrivals) {
    host::check_shared(barrier, 8, 8, "barrier_init");
    if (arrivals < 1) host::fail(host::text("barrier_init for %d arrivals", arrivals));
    *barrier = host::BARRIER;
    host::Barrier fresh = {barrier, arrivals, arrivals};
    fresh.owner = host::machine->current;
    if (!host::machine->current->block->barriers.emplace(barrier, fresh).second)
        host::fail("barrier_init of " + host::place(barrier) + " again");
}
inline void barriers_ready() {
    for (auto& barrier : host::machine->current->block->barriers)
        if (barrier.second.owner == host::machine->current) barrier.second.ready = true;
}
inline void barrier_arrive(u64* barrier) {
    host::maybe_yield();
    host::arrive(host::barrier_at(barrier, "barrier_arrive"));
    host::maybe_yield();
}
inline void barrier_arrive(u64* barrier, int times) {
    for (int i = 0; i < times; i++) barrier_arrive(barrier);
}
inline void barrier_expect(u64* barrier, int bytes) {
    host::maybe_yield();
    host::arrive(host::barrier_at(barrier, "barrier_expect"), bytes);
    host::maybe_yield();
}
inline void barrier_wait(u64* word, int phase) {
    host::maybe_yield();
    host::Barrier& barrier = host::barrier_at(word, "barrier_wait");
    if (phase != 0 && phase != 1) host::fail(host::text("barrier_wait for phase %d: it is 0 or 1", phase));
    if ((barrier.phase & 1) != phase) return;
    barrier.waiters.push_back(host::machine->current);
    host::wait_for(host::describe_wait, &barrier, phase);
    if ((barrier.phase & 1) == phase)
        host::fail("barrier_wait missed a whole phase of " + host::name(barrier));
}

template <bool EVICT_FIRST = false> inline void copy_bulk(void* to, const void* from, int bytes, u64* word) {
    if (bytes < 16 || bytes % 16) host::fail(host::text("copy_bulk of %d bytes", bytes));
    host::check_shared(to, bytes, 16, "copy_bulk");
    host::check_global(from, bytes, 16, "copy_bulk");
    host::Barrier& barrier = host::ready_barrier(word, "copy_bulk");
    host::start_copy(*host::machine->current->block, to, bytes, false, host::machine->now + host::some_time(),
                     &barrier, "copy_bulk", [=](u8* into) { memcpy(into, from, bytes); });
    host::maybe_yield();
}
template <bool EVICT_FIRST = false> inline void copy_box(void* to, const TensorMap* map, int x, int y, u64* barrier) {
    host::start_box(to, map, {x, y}, barrier);
    host::maybe_yield();
}
template <bool EVICT_FIRST = false> inline void copy_box(void* to, const TensorMap* map, int x, int y, int z, u64* barrier) {
    host::start_box(to, map, {x, y, z}, barrier);
    host::maybe_yield();
}
template <bool EVICT_FIRST = false> inline void copy_box(void* to, const TensorMap* map, int x, int y, int z, int u, int v, u64* barrier) {
    host::start_box(to, map, {x, y, z, u, v}, barrier);
    host::maybe_yield();
}
inline void prefetch_map(const TensorMap*) {}
namespace host {

inline void copy_few(void* to, const void* from, int bytes, bool there, const char* what) {
    check_shared(to, bytes, bytes, what);
    if (there) check_global(from, bytes, bytes, what);
    Fiber& self = *machine->current;
    u64 due = machine->now + some_time();
    self.few_there = std::max(self.few_there, due);
    start_copy(*self.block, to, bytes, false, due, nullptr, what, [=](u8* into) {
        if (there) memcpy(into, from, bytes);
        else memset(into, 0, bytes);
    });
}

}  // namespace host

inline void copy_float(float* to, const float* from) { host::copy_few(to, from, 4, true, "copy_float"); }
inline void copy_sixteen(void* to, const void* from, bool there) {
    host::copy_few(to, from, 16, there, "copy_sixteen");
}
inline void arrive_with_copies(u64* word) {
    host::Fiber& self = *host::machine->current;
    host::Barrier& barrier = host::barrier_at(word, "arrive_with_copies");
    u64 due = std::max(self.few_there, host::machine->now) + host::dice(16);
    host::later(due, host::started("arrive_with_copies"), [&barrier, &self] {
        host::check_live(*self.block);
        host::arrive(barrier);
    });
    host::maybe_yield();
}
inline void fence_async_shared() {}
inline void fence_async_global() {}

inline int load_acquire(const int* p) {
    host::maybe_yield(2);
    return *static_cast<const volatile int*>(p);
}
inline void wait_until_at_least(const int* p, int value) {
    host::maybe_yield();
    if (*static_cast<const volatile int*>(p) >= value) return;
    host::machine->pollers.push_back(host::machine->current);
    host::wait_for(host::describe_poll, p, value);
}
inline void wait_for_shared(const int* p, int value) { wait_until_at_least(p, value); }
inline void store_shared(int* p, int value) {
    host::maybe_yield();
    *p = value;
}
inline void add_shared(int* p, int value) {
    host::maybe_yield(8);
    *p += value;
}
inline int add_release(int* p, int value) {
    host::maybe_yield();
    int before = *p;
    *p = before + value;
    return before;
}
inline int take_ticket(int* p) {
    if (host::machine->current->lane()) host::fail("take_ticket by another lane than the first");
    return add_release(p, 1);
}
