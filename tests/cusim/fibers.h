// The machine under the simulator: one fiber per CUDA thread of a block, and what they wait for.
//
// The live lanes of a warp form a ring, and so do the warps. A lane that has to wait goes to the
// next lane; the last lane of a warp that has to wait goes to the next warp; the last one to arrive
// is the one that goes on. So a shuffle or a barrier costs one switch per thread, and there is no
// scheduler. When no lane of a warp can go on and it is not because all are at a block barrier,
// then what they wait for never comes: that is reported. (Threads switch nowhere else: one that
// asks again and again for what another is to write ends by the time limit of guard.h.)
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#ifndef __x86_64__
#define CUSIM_SETJMP
#endif
#ifdef CUSIM_SETJMP
#include <setjmp.h>
#include <ucontext.h>
#endif

// With checks on, the simulator's own functions stay out of line: what is inlined into a kernel
// would be checked as part of it.
#ifdef CUSIM_CHECK
#define CUSIM static inline __attribute__((noinline, no_sanitize("thread", "undefined")))
constexpr bool CHECKED = true;
#else
#define CUSIM static inline __attribute__((always_inline))
constexpr bool CHECKED = false;
#endif
#define CUSIM_SLOW static __attribute__((noinline, no_sanitize("thread", "undefined")))

// Where a function was called from; for functions that are not inlined.
#define CUSIM_CALLER __builtin_return_address(0)

struct uint3 { unsigned x, y, z; };

namespace cusim {

constexpr int LANES = 32, MAX_THREADS = 1024;
constexpr unsigned FULL = 0xffffffffu;
constexpr size_t STACK = 64 << 10;
// Stacks a power of two apart would compete for the same few places of the cache.
constexpr size_t STACK_STEP = STACK + 320;

// What a lane waits for. Those of a warp come first.
enum Wait : uint8_t { NOTHING, SHUFFLE, VOTE, SYNCWARP, BARRIER };
static const char* const WAITS[] = {"", "a shuffle", "a vote", "__syncwarp", "__syncthreads"};

enum Kind { FINE, BOUNDS, UNINITIALISED, RACE, DIVERGENCE, MISALIGNED, ARITHMETIC, ENDLESS, EARLY };

// What went wrong, for Python to put in words; sim.py has the same as a ctypes structure.
struct Fault {
    int32_t kind;
    uint32_t thread, other_thread;  // number in the block
    uint32_t block, other_block;    // number in the grid
    int32_t size, line;             // bytes accessed; line or 0
    int32_t write, other_write;     // 0 read, 1 write, 2 atomic
    uint64_t address, place, other_place;  // of memory; of code
    char text[4096];
};

struct Warp;

struct Fiber {
    void *sp, *bp, *ip;  // where to go on
    Fiber *next, *before;  // the ring of this warp's live lanes
    Warp* warp;
    unsigned lane, number;  // in the warp, in the block
    uint3 index;
    // What it waits for, or did last: kind, lanes, line, and Warp.parity or Block.barriers then.
    Wait waits;
    unsigned mask, line, stamp;
    bool waits_for_some;     // for a part of its warp
    bool has_waited;         // for the kernels before this one
    uint32_t segment;        // what it has done since it last waited; of checks.h
    uint32_t fences, fenced; // how many so far; its segment since the last one
    uint64_t received[LANES];  // in a collective of a part of its warp
#ifdef CUSIM_SETJMP
    jmp_buf registers;
    ucontext_t start;
    bool started;
#endif
};

struct Warp {
    int live;                       // lanes that have not exited; of those:
    int meeting, at_barrier, some;  // waiting for all lanes, for the block, for a part of the warp
    unsigned parity;                // which of `values` the next collective of all lanes uses
    unsigned syncs;                 // how often all lanes met in __syncwarp
    Fiber* entry;                   // the lane to go on with
    Warp *next, *before;            // the ring of warps that have live lanes
    Fiber* lanes[LANES];            // null: exited
    // By lane. Two, because the first lanes may come to the next collective while the last have
    // still to read what came of this one.
    uint64_t values[2][LANES];
};

struct Block {
    int live, arrived;   // threads that have not exited; of those: at the barrier
    unsigned barriers;   // passed so far
    int votes, verdict;  // of __syncthreads_count: so far, and of the last barrier
    unsigned number;     // in the grid
    unsigned threads, warps;
    uint3 index, size, grid;
};

static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / LANES];
static Block block;
static Fiber* current;
static Fiber outside;  // the caller of the launch
static Fault* fault;
static char* stacks;
static void (*kernel)(const void*);
static const void* kernel_args;

// ---- switching ----

#ifndef CUSIM_SETJMP

#ifdef __AVX512F__
#define CUSIM_MORE_REGISTERS                                                                     \
    , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25",  \
        "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "k0", "k1", "k2", "k3", "k4",      \
        "k5", "k6", "k7"
#else
#define CUSIM_MORE_REGISTERS
#endif

// All registers are lost on the way, so that the compiler saves those few that it needs.
CUSIM void switch_to(Fiber* to) {
    Fiber* from = current;
    current = to;
    asm volatile(
        "movq %%rsp, 0(%0)\n\t"
        "movq %%rbp, 8(%0)\n\t"
        "leaq 1f(%%rip), %%rax\n\t"
        "movq %%rax, 16(%0)\n\t"
        "movq 0(%1), %%rsp\n\t"
        "movq 8(%1), %%rbp\n\t"
        "jmp *16(%1)\n"
        "1:"
        : "+D"(from), "+S"(to)
        :
        : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc",
          "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
          "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15" CUSIM_MORE_REGISTERS);
}

CUSIM_SLOW void prepare(Fiber* f, char* stack, void (*entry)()) {
    f->sp = stack + STACK - 8;  // as if called
    f->bp = nullptr;
    f->ip = reinterpret_cast<void*>(entry);
}

#else  // slower, for other machines

CUSIM_SLOW void switch_to(Fiber* to) {
    Fiber* from = current;
    current = to;
    if (_setjmp(from->registers)) return;
    if (to != &outside && !to->started) {
        to->started = true;
        setcontext(&to->start);
    }
    _longjmp(to->registers, 1);
}

CUSIM_SLOW void prepare(Fiber* f, char* stack, void (*entry)()) {
    getcontext(&f->start);
    f->start.uc_stack.ss_sp = stack;
    f->start.uc_stack.ss_size = STACK;
    f->start.uc_link = nullptr;
    makecontext(&f->start, entry, 0);
    f->started = false;
}

#endif

CUSIM char* stack_of(const Fiber* f) { return stacks + f->number * STACK_STEP; }

// ---- faults ----

[[noreturn]] CUSIM_SLOW void leave() {
    switch_to(&outside);
    __builtin_unreachable();
}

CUSIM_SLOW Fault* new_fault(Kind kind) {
    memset(fault, 0, sizeof *fault);
    fault->kind = kind;
    fault->block = block.number;
    fault->thread = current->number;
    return fault;
}

CUSIM bool is_waiting(const Fiber* f) {
    if (f->waits == NOTHING) return false;
    if (f->waits == BARRIER) return f->stamp == block.barriers;
    return f->mask == FULL ? f->stamp == f->warp->parity : f->waits_for_some;
}

// What threads wait for never comes: say where all lanes of this warp are.
[[noreturn]] CUSIM_SLOW void fail_divergence(const Warp* w, const char* what) {
    Fault* f = new_fault(DIVERGENCE);
    f->line = current->line;
    char lanes[LANES][96];
    for (int i = 0; i < LANES; i++) {
        const Fiber* a = w->lanes[i];
        if (!a) {
            snprintf(lanes[i], sizeof lanes[i], "exited");
        } else if (a->waits == NOTHING) {
            snprintf(lanes[i], sizeof lanes[i], "run");
        } else {
            char mask[24] = "";
            if (a->mask != FULL) snprintf(mask, sizeof mask, " for lanes %08x", a->mask);
            snprintf(lanes[i], sizeof lanes[i], "%s %s in line %u%s",
                     is_waiting(a) ? "wait in" : "run, last seen in", WAITS[a->waits], a->line,
                     mask);
        }
    }
    int n = snprintf(f->text, sizeof f->text, "%s; warp %d:", what, int(w - warps));
    for (int i = 0; i < LANES && n < int(sizeof f->text); i++) {
        unsigned same = 0;
        int first = LANES;
        for (int j = LANES - 1; j >= 0; j--) {
            if (strcmp(lanes[i], lanes[j]) == 0) same |= 1u << j, first = j;
        }
        if (first != i) continue;
        n += snprintf(f->text + n, sizeof f->text - n, " lanes %08x %s;", same, lanes[i]);
    }
    leave();
}

// ---- waiting ----

CUSIM bool can_run(const Warp* w) { return w->meeting + w->at_barrier + w->some < w->live; }

CUSIM_SLOW void release_barrier() {
    block.barriers++;
    block.arrived = 0;
    block.verdict = block.votes;
    block.votes = 0;
    for (unsigned i = 0; i < block.warps; i++) warps[i].at_barrier = 0;
}

CUSIM_SLOW void enter_next_warp(Warp* w) {
    Warp* to = w->next;
    for (unsigned i = 0; i < block.warps && !can_run(to); i++) to = to->next;
    if (!can_run(to)) fail_divergence(w, "no thread of the block can go on");
    switch_to(to->entry);
}

CUSIM_SLOW void leave_warp(Fiber* f) {
    Warp* w = f->warp;
    if (w->at_barrier != w->live) fail_divergence(w, "what lanes wait for never comes");
    w->entry = f->next;
    enter_next_warp(w);
}

// Let others run: of this warp, or when none of them can, of the next.
CUSIM void yield(Fiber* f) {
    if (__builtin_expect(can_run(f->warp), 1)) {
        switch_to(f->next);
    } else {
        leave_warp(f);
    }
}

CUSIM void note(Fiber* f, Wait waits, unsigned mask, unsigned line, unsigned stamp) {
    f->waits = waits;
    f->mask = mask;
    f->line = line;
    f->stamp = stamp;
}

// All lanes of a warp meet; what each gave is in the result, by lane.
CUSIM const uint64_t* meet(Fiber* f, Wait waits, uint64_t value, unsigned line) {
    Warp* w = f->warp;
    unsigned parity = w->parity;
    w->values[parity][f->lane] = value;
    note(f, waits, FULL, line, parity);
    if (++w->meeting == LANES) {
        for (int i = 0; CHECKED && i < LANES; i++) {
            if (w->lanes[i]->waits != waits || w->lanes[i]->line != line) {
                fail_divergence(w, "lanes meet in different places");
            }
        }
        w->meeting = 0;
        w->parity = 1 - parity;
        if (waits == SYNCWARP) w->syncs++;
    } else {
        do yield(f);
        while (w->parity == parity);
    }
    return w->values[parity];
}

// The same for a part of a warp. Rare, so each lane gets a copy.
CUSIM_SLOW const uint64_t* meet_some(
    Fiber* f, Wait waits, unsigned mask, uint64_t value, unsigned line) {
    Warp* w = f->warp;
    f->received[f->lane] = value;
    f->waits_for_some = true;
    note(f, waits, mask, line, 0);
    if (!(mask >> f->lane & 1)) fail_divergence(w, "a lane is not in its own mask");
    w->some++;
    uint64_t values[LANES] = {};
    bool all = true;
    for (int i = 0; i < LANES && all; i++) {
        if (!(mask >> i & 1)) continue;
        const Fiber* g = w->lanes[i];
        all = g && is_waiting(g) && g->waits == waits && g->mask == mask &&
              (!CHECKED || g->line == line);
        if (all) values[i] = g->received[i];
    }
    for (int i = 0; i < LANES && all; i++) {
        if (!(mask >> i & 1)) continue;
        memcpy(w->lanes[i]->received, values, sizeof values);
        w->lanes[i]->waits_for_some = false;
        w->some--;
    }
    while (f->waits_for_some) yield(f);
    return f->received;
}

CUSIM const uint64_t* collective(Wait waits, unsigned mask, uint64_t value, unsigned line) {
    Fiber* f = current;
    if (__builtin_expect(mask == FULL, 1)) return meet(f, waits, value, line);
    return meet_some(f, waits, mask, value, line);
}

CUSIM_SLOW void check_barrier() {
    for (unsigned i = 0; i < block.threads; i++) {
        Warp* w = fibers[i].warp;
        if (w->lanes[fibers[i].lane] && fibers[i].line != current->line) {
            fail_divergence(w, "threads meet in different __syncthreads");
        }
    }
}

// All threads that have not exited meet; the result is how many of them voted.
CUSIM int barrier(bool vote, unsigned line) {
    Fiber* f = current;
    unsigned passed = block.barriers;
    note(f, BARRIER, FULL, line, passed);
    block.votes += vote;
    f->warp->at_barrier++;
    if (++block.arrived == block.live) {
        if (CHECKED) check_barrier();
        release_barrier();
    } else {
        do yield(f);
        while (block.barriers == passed);
    }
    return block.verdict;
}

// ---- a thread, a block ----

CUSIM_SLOW void run_thread() {
    kernel(kernel_args);
    Fiber* f = current;
    Warp* w = f->warp;
    if (--block.live == 0) leave();
    w->lanes[f->lane] = nullptr;
    w->entry = f->next;
    f->next->before = f->before;
    f->before->next = f->next;
    if (--w->live == 0) {
        w->next->before = w->before;
        w->before->next = w->next;
    }
    if (block.arrived == block.live) release_barrier();
    if (w->live) yield(f);
    enter_next_warp(w);
    __builtin_unreachable();
}

// Random numbers of a seed; 0 is no seed and leaves everything in its order.
CUSIM_SLOW uint64_t random_number(uint64_t* state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;  // splitmix64
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

CUSIM_SLOW void order(unsigned* numbers, unsigned n, uint64_t* seed) {
    for (unsigned i = 0; i < n; i++) numbers[i] = i;
    for (unsigned i = n; *seed && i > 1; i--) {
        unsigned j = random_number(seed) % i, kept = numbers[j];
        numbers[j] = numbers[i - 1];
        numbers[i - 1] = kept;
    }
}

// Run the threads of one block, first in the order that the seed gives.
CUSIM_SLOW void run_block(uint64_t* seed) {
    block.live = block.threads;
    block.arrived = block.barriers = block.votes = 0;
    unsigned ring[LANES];
    order(ring, block.warps, seed);
    Warp* first = &warps[ring[0]];
    for (unsigned i = 0; i < block.warps; i++) {
        Warp* w = &warps[ring[i]];
        memset(w, 0, offsetof(Warp, values));
        w->next = &warps[ring[(i + 1) % block.warps]];
    }
    for (unsigned i = 0; i < block.warps; i++) warps[i].next->before = &warps[i];
    for (unsigned i = 0; i < block.warps; i++) {
        Warp* w = &warps[i];
        w->live = block.threads - i * LANES < LANES ? block.threads - i * LANES : LANES;
        order(ring, w->live, seed);
        w->entry = &fibers[i * LANES + ring[0]];
        for (int j = 0; j < w->live; j++) {
            Fiber* f = &fibers[i * LANES + ring[j]];
            f->next = &fibers[i * LANES + ring[(j + 1) % w->live]];
            f->next->before = f;
            f->warp = w;
            f->lane = ring[j];
            f->number = i * LANES + ring[j];
            f->index = {f->number % block.size.x, f->number / block.size.x % block.size.y,
                        f->number / (block.size.x * block.size.y)};
            f->waits = NOTHING;
            f->mask = f->line = f->segment = f->fences = f->fenced = 0;
            f->waits_for_some = false;
            f->has_waited = !CUSIM_OVERLAPS;
            w->lanes[f->lane] = f;
            prepare(f, stack_of(f), run_thread);
        }
    }
    current = &outside;
    switch_to(first->entry);
}

}  // namespace cusim
